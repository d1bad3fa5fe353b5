"""Which layouts a run can have on so many GPUs, in the order in which to take them.

Searched are tensor degrees within a node, all pipeline degrees, every kind of sharding, microbatch
sizes, 1f1b and interleaved. A key of [parallel] that is given is kept, not searched, where it
applies: a schedule with a pipeline, sharding with several copies. So come in the
others: gpipe, never faster and keeping more, zero-bubble, which keeps more than 1f1b, and sequence
parallelism.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from pythia_fast import plan
from pythia_fast.communication import NODE, fabric
from pythia_fast.config import Config, Parallel
from pythia_fast.errors import InputError
from pythia_fast.estimate import Estimate
from pythia_fast.layouts import Layout
from pythia_fast.parallel.degrees import degrees
from pythia_fast.values import toml_value

MOST_GPUS = 1024
LARGEST_MICROBATCH = 64  # rows
FILLED = 0.95  # of a card's memory at most: NCCL, libraries and the allocator take theirs
AS_FAST = 1.01  # of the fastest step: there the simpler layout is recommended
SIMPLEST_SHARD = ("optimizer", "none", "full")
SHOWN = 10  # lines of the text


def candidates(c: Config, gpus: int, given: Collection[str] = ()) -> Iterator[Layout]:
    """Every layout that `parallel.degrees` accepts; whether it fits is not asked here.

    given: keys whose value is kept though it is the default, and train.micro_batch_size.
    """
    p, defaults = c.parallel, Parallel()

    def kept(key: str) -> bool:
        return f"parallel.{key}" in given or getattr(p, key) != getattr(defaults, key)

    def options(key: str, searched: tuple[Any, ...]) -> tuple[Any, ...]:
        return (getattr(p, key),) if kept(key) else searched

    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    within_node = tuple(n for n in divisors if n <= NODE and NODE % n == 0)
    for tensor, pipeline in product(
        options("tensor", within_node), options("pipeline", tuple(divisors))
    ):
        inner = max(tensor, 0) * max(pipeline, 0)
        if inner == 0 or gpus % inner or p.data not in (-1, gpus // inner):
            continue
        data = gpus // inner
        orders: list[tuple[str, int]] = [("1f1b", 1)]
        if pipeline > 1:
            schedules = options("schedule", ("1f1b", "interleaved-1f1b"))
            several = options("stages_per_rank", (2, 3, 4))
            one = options("stages_per_rank", (1,))
            orders = [
                (name, v)
                for name in schedules
                for v in (several if name == "interleaved-1f1b" else one)
            ]
        sequences = options("sequence", (False,))
        sizes = range(1, LARGEST_MICROBATCH + 1)
        if "train.micro_batch_size" in given:
            sizes = range(c.train.micro_batch_size, c.train.micro_batch_size + 1)
        for shard, sequence, rows, (schedule, v) in product(
            options("shard", SIMPLEST_SHARD) if data > 1 else ("none",),
            sequences, sizes, orders,
        ):  # fmt: skip
            if c.train.batch_size % (max(data, c.precision.ranks) * rows):
                continue
            layout = Layout(data, tensor, pipeline, sequence, schedule, v, shard, rows)
            if _runs(c, layout):
                yield layout


def _runs(c: Config, layout: Layout) -> bool:
    try:
        degrees(page(c, layout), layout.gpus)
    except InputError:
        return False
    return True


def page(c: Config, layout: Layout) -> Config:
    """`c` with the keys of a layout."""
    keys = asdict(layout)
    rows = keys.pop("rows")
    return replace(
        c, parallel=Parallel(**keys), train=replace(c.train, micro_batch_size=rows)
    )  # fmt: skip


def ranked(
    c: Config, gpus: int, gpu: str, network: str | None = None, given: Collection[str] = ()
) -> list[Estimate]:
    """The fastest of each (data, tensor, pipeline, shard) that fits, the recommended one first.

    given: as in `candidates`. Raises InputError for what is not known, and where no layout fits.
    """
    if not 1 < gpus <= MOST_GPUS:
        raise InputError(f"--gpus {gpus}: 1 to {MOST_GPUS} are planned")
    card, on = plan.known(gpu), fabric(gpu, network)
    plan.must_be_16_bit(c)
    if c.parallel.schedule == "zero-bubble" and c.parallel.stages_per_rank > 1:
        raise InputError(
            f"parallel.stages_per_rank = {c.parallel.stages_per_rank}: zero-bubble is planned with "
            "one stage a process"
        )
    best: dict[tuple[Any, ...], tuple[float, Estimate]] = {}
    found = 0
    for layout in candidates(c, gpus, given):
        found += 1
        estimate = Estimate(c, layout, card, on)
        if estimate.memory().total > FILLED * card.memory:
            continue
        seconds = estimate.step().total
        key = (layout.data, layout.tensor, layout.pipeline, layout.shard)
        if key not in best or seconds < best[key][0]:
            best[key] = seconds, estimate
    if not best:
        raise InputError(_nothing(c, gpus, card, found))
    fastest = min(seconds for seconds, _ in best.values())
    near = [entry for entry in best.values() if entry[0] <= AS_FAST * fastest]
    first = min(near, key=lambda entry: (*_simplicity(entry[1].layout), entry[0]))
    rest = sorted((e for e in best.values() if e is not first), key=lambda entry: entry[0])
    return [estimate for _, estimate in [first, *rest]]


def _simplicity(at: Layout) -> tuple[Any, ...]:
    return at.pipeline, at.tensor, SIMPLEST_SHARD.index(at.shard)


def _nothing(c: Config, gpus: int, card: plan.Gpu, found: int) -> str:
    if found:
        room = f"{FILLED:.0%} of the {card.memory / 1e9:.0f} GB of a {card.name}"
        return f"none of {found:,} layouts fits in {room}"
    degrees(c, gpus)  # names the two numbers of the page that do not fit
    return f"--gpus {gpus}: no layout has whole microbatches of batch_size {c.train.batch_size}"


# --- rows and words -------------------------------------------------------------------------------


def rows(
    c: Config, gpus: int, gpu: str, network: str | None = None, given: Collection[str] = ()
) -> list[dict[str, Any]]:
    """`ranked` as rows of JSON: bytes, seconds of a step, the layout's keys; nothing measured."""
    found = ranked(c, gpus, gpu, network, given)
    return [_row(estimate, i == 0) for i, estimate in enumerate(found)]


def _row(estimate: Estimate, recommended: bool) -> dict[str, Any]:
    c, at, step, memory = estimate.config, estimate.layout, estimate.step(), estimate.memory()
    per_token = plan.flops(c.model, c.data.seq_len)
    rate = c.tokens_per_step / step.total
    keys = asdict(at)
    return {
        "gpus": at.gpus,
        "gpu": estimate.gpu.name,
        "links": estimate.fabric.name,
        "recommended": recommended,
        **{key: keys[key] for key in keys if key != "rows"},
        "micro_batch_size": at.rows,
        "microbatches": estimate.microbatches,
        "layers_of_stages": [chunk.layers for chunk in estimate.chunks],
        "parameters": c.model.parameters,
        "memory_bytes": asdict(memory)
        | {"total": memory.total, "usable": FILLED * estimate.gpu.memory},
        "communication": [asdict(one) for one in estimate.collectives()],
        "seconds_per_step": asdict(step) | {"exposed": step.exposed, "total": step.total},
        "bubble_share": step.bubble / step.total,
        "tokens_per_step": c.tokens_per_step,
        "tokens_per_s": rate,
        "hours": step.total * c.train.steps / 3600,
        "mfu_causal": plan.mfu(per_token.causal, rate / at.gpus, estimate.gpu),
        "measured": False,
    }


def describe(found: list[dict[str, Any]]) -> str:
    """`rows` in words: a line a layout, then what the recommended one sends."""
    first = found[0]
    lines = [
        f"{first['parameters']:,} parameters on {first['gpus']} {first['gpu']} "
        f"({first['links']}), {first['tokens_per_step']:,} tokens a step",
        f"{'data':>5} {'tensor':>6} {'pipeline':>8} {'shard':>9} {'rows':>4}  {'schedule':21}"
        f"{'GB':>6} {'ms/step':>9} {'tokens/s':>11} {'hours':>8} {'MFU':>5} "
        f"{'bubble':>6} {'exposed':>7}",
    ]
    for row in found[:SHOWN]:
        step = row["seconds_per_step"]
        lines.append(
            f"{row['data']:5} {row['tensor']:6} {row['pipeline']:8} {row['shard']:>9} "
            f"{row['micro_batch_size']:4}  {schedule_of(row):21}"
            f"{row['memory_bytes']['total'] / 1e9:6.1f} {1e3 * step['total']:9,.0f} "
            f"{row['tokens_per_s']:11,.0f} {row['hours']:8,.1f} {row['mfu_causal']:5.1%} "
            f"{row['bubble_share']:6.1%} {step['exposed'] / step['total']:7.1%}"
        )
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} slower ones (--json has all)")
    lines.append(f"recommended: the first, {flags(first)}; a step of it sends, a GPU:")
    for one in first["communication"]:
        lines.append(
            f"  {one['axis']:8} {one['kind']:14} {one['what']:32} {one['count']:6,} x "
            f"{_bytes(one['message']):>8}, {one['link']:14} {1e3 * one['seconds']:9,.2f} ms, "
            f"exposed {1e3 * one['exposed']:,.2f}"
        )
    lines.append("estimates from a model (docstrings of pythia_fast/estimate.py and "
                 "communication.py), not measured")  # fmt: skip
    return "\n".join(lines)


def flags(row: dict[str, Any]) -> str:
    """The keys of a row as flags of `train`, where they are not the defaults."""
    defaults = asdict(Parallel()).items()
    shown = {f"parallel.{key}": (row[key], default) for key, default in defaults if key in row}
    shown["train.micro_batch_size"] = row["micro_batch_size"], None
    if row["data"] == 1:
        del shown["parallel.shard"]  # of one copy: nothing to split
    return " ".join(
        f"--{key} {toml_value(value).strip(chr(34))}"
        for key, (value, default) in shown.items()
        if value != default
    )


def schedule_of(row: dict[str, Any]) -> str:
    """Schedule, stages a rank and sequence parallelism in a few words."""
    name = row["schedule"] if row["pipeline"] > 1 else ""
    name += f" x{row['stages_per_rank']}" if row["stages_per_rank"] > 1 else ""
    return name + (", sequence" if name else "sequence") * row["sequence"]


def _bytes(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
