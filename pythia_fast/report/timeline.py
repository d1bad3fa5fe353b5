"""The figure of a pipeline's step under each schedule, as `simulation` has it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pythia_fast import plan, simulation
from pythia_fast.communication import fabric
from pythia_fast.config import Config
from pythia_fast.errors import InputError
from pythia_fast.estimate import Estimate
from pythia_fast.layouts import Layout
from pythia_fast.parallel.degrees import degrees
from pythia_fast.recommend import FILLED

KINDS = {
    "F": ("forward", "#1f5fa8"),
    "B": ("backward", "#d1495b"),
    "I": ("backward, inputs", "#e07b39"),
    "W": ("backward, weights", "#2e8b57"),
    "gather": ("all-gather of weights", "#b8a000"),
    "reduce": ("reduction of gradients", "#7b5ea7"),
    "update": ("norm and optimizer", "#6b6b6b"),
}
COMMUNICATION = ("gather", "reduce")
LABELLED = 0.010  # share of the figure's width that a microbatch's number takes


def data(c: Config, gpus: int, gpu: str, network: str | None = None) -> dict[str, Any]:
    """A step of `c`'s own layout under every schedule it can have, as JSON could hold it.

    Raises InputError where the layout does not fit the GPUs or has no pipeline.
    """
    if gpus == 1 or c.parallel.pipeline == 1:
        raise InputError("--timeline draws pipelines: --parallel.pipeline above 1 is needed")
    found, card, on = degrees(c, gpus), plan.known(gpu), fabric(gpu, network)
    plan.must_be_16_bit(c)
    rows, p = c.train.micro_batch_size, c.parallel
    panels = []
    for name in simulation.SCHEDULES:
        tried = []
        for chunks in _chunks(c, name):
            layout = Layout(found.data, found.tensor, found.pipeline, p.sequence, name, chunks,
                            p.shard, rows)  # fmt: skip
            # without microbatches in whole rounds of a schedule there is no step of it
            with suppress(InputError):
                estimate = Estimate(c, layout, card, on)
                tried.append((estimate, simulation.of_layout(estimate)))
        if tried:
            panels.append(_panel(*min(tried, key=lambda pair: pair[1].end)))
    title = (
        f"One step on {gpus} {card.name} ({on.name}): data {found.data}, tensor {found.tensor}, "
        f"pipeline {found.pipeline}, shard {p.shard}; {c.model.preset or 'model'}, "
        f"{panels[0]['microbatches']} microbatches of {rows} rows. Simulated, not measured."
    )
    return {"title": title, "ranks": found.pipeline, "panels": panels}


def _chunks(c: Config, schedule: str) -> tuple[int, ...]:
    """Stages a rank to try; the fastest is drawn."""
    if schedule != "interleaved-1f1b":
        return (1,)
    given = c.parallel.stages_per_rank
    return tuple(
        v for v in ((given,) if given > 1 else (2, 3, 4))
        if c.parallel.pipeline * v <= c.model.layers
    )  # fmt: skip


def _panel(estimate: Estimate, line: simulation.Timeline) -> dict[str, Any]:
    at = estimate.layout
    memory = estimate.memory().total
    name = at.schedule + (f", {at.stages_per_rank} stages a rank" if at.stages_per_rank > 1 else "")
    over = "" if memory <= FILLED * estimate.gpu.memory else ": does not fit"
    return {
        "title": f"{name}: {1e3 * line.end:,.0f} ms, idle {line.bubble:.1%} of it, "
        f"{memory / 1e9:.0f} GB at most{over}",
        "microbatches": estimate.microbatches,
        "events": [
            [e.rank, e.stage // at.pipeline, e.kind, e.microbatch,
             round(1e3 * e.start, 3), round(1e3 * e.end, 3)]
            for e in line.events
        ],
    }  # fmt: skip


def draw(found: dict[str, Any]) -> Figure:
    """A panel a schedule on one axis of time; a line a rank, its communication below it."""
    panels, ranks = found["panels"], found["ranks"]
    end = max(event[5] for panel in panels for event in panel["events"])
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(13, len(panels) * (0.6 + 0.21 * ranks) + 0.9), dpi=130,
        layout="constrained", sharex=True, squeeze=False,
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _bars(axis, panel["events"])
        for rank, _, kind, microbatch, start, stop in panel["events"]:
            if kind in "FBIW" and (stop - start) / end > LABELLED:
                axis.text((start + stop) / 2, rank - 0.08, str(microbatch), fontsize=5.5,
                          color="white", ha="center", va="center")  # fmt: skip
        axis.set_ylim(ranks - 0.4, -0.6)
        axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axis.tick_params(labelsize=8)
        axis.set_title(panel["title"], loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    bottom = axes[-1, 0]
    bottom.set_xlim(0, end * 1.005)
    bottom.set_xlabel(
        "ms from the beginning of the step; numbers are microbatches, later stages of a rank paler",
        fontsize=9,
    )
    shown = {event[2] for panel in panels for event in panel["events"]}
    handles = [Patch(color=colour, label=name) for kind, (name, colour) in KINDS.items()
               if kind in shown]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )
    return figure


def _bars(axis: Axes, events: list[list[Any]]) -> None:
    """Computation above, communication in the strip below; later chunks are paler."""
    together: defaultdict[tuple[int, int, str], list[tuple[float, float]]] = defaultdict(list)
    for rank, chunk, kind, _, start, stop in events:
        together[rank, chunk, kind].append((start, stop - start))
    for (rank, chunk, kind), spans in together.items():
        low, height = (0.27, 0.14) if kind in COMMUNICATION else (-0.4, 0.64)
        alpha = 1.0 if kind in COMMUNICATION else 1 - 0.16 * min(chunk, 4)
        axis.broken_barh(
            spans, (rank + low, height), facecolors=KINDS[kind][1], alpha=alpha,
            edgecolor="white", linewidth=0.25,
        )  # fmt: skip


def save(found: dict[str, Any], path: Path) -> None:
    """Writes the PNG in one go."""
    figure = draw(found)
    figure.suptitle(found["title"], x=0.01, ha="left", fontsize=10)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
