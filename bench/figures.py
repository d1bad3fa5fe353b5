"""The figures of the benchmarks. Each is drawn from plain data, whose digest is kept in the PNG."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from bench.bench_train import SMALL_STEP, STEP_TOKENS
from bench.op import SIZES
from bench.record import Row, newest
from pythia_fast import plan
from pythia_fast.config import resolve
from pythia_fast.report.figures import GUIDE, OURS

KEY = "pythia-fast data sha256"
PEER_COLOURS = ("#d1495b", "#edae49", "#2e8b57", "#7b5ea7", "#8c6d4f", "#3aa6b9", "#c06c9e")
REFERENCE_COLOUR = "#555555"
LABELLED = 12  # bars of a panel at most; more become points, their figures stand in the table
BOUND_GPU = "H200"
BOUND_SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")


@dataclass(frozen=True)
class Figure:
    """file: its name under docs/; data: all that `draw` shows, as JSON could hold it."""

    file: str
    title: str
    data: Any
    draw: Callable[[Any], Canvas]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.title, self.data]).encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        canvas = self.draw(self.data)
        canvas.suptitle(self.title, x=0.01, ha="left", fontsize=10)
        canvas.savefig(folder / self.file, metadata={KEY: self.digest})
        plt.close(canvas)
        return folder / self.file

    def is_saved(self, folder: Path) -> bool:
        from PIL import Image

        path = folder / self.file
        if not path.exists():
            return False
        with Image.open(path) as image:
            return image.info.get(KEY) == self.digest


def all_figures(rows: Sequence[Row]) -> list[Figure]:
    """Those that the rows have data for; the bounds of the suite need none."""
    latest = newest(rows)
    found = [_bounds(latest)]
    for device in sorted({row["device"] for row in latest}):
        mine = [row for row in latest if row["device"] == device]
        found += [f for f in (_training(device, mine), _kernels(device, mine)) if f is not None]
    return found


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Canvas, Any]:
    canvas, axes = plt.subplots(
        rows, columns, figsize=(width, height), dpi=130, layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return canvas, axes


def _legend(canvas: Canvas, handles: list[Any], columns: int = 9) -> None:
    """Below the panels, where it covers no point."""
    canvas.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _colour(impl: str, impls: Sequence[str]) -> str:
    if impl == "ours":
        return OURS
    if impl == "eager":
        return REFERENCE_COLOUR
    others = [i for i in impls if i not in ("ours", "eager")]
    return PEER_COLOURS[others.index(impl) % len(PEER_COLOURS)]


def _in_order(impls: set[str]) -> list[str]:
    """Ours first, then the reference, then the peers by name."""
    return sorted(impls, key=lambda i: (i != "ours", i != "eager", i))


# --- the suite's bounds, with what was measured on them -------------------------------------------


def _bounds(rows: Sequence[Row]) -> Figure:
    card = plan.GPUS[BOUND_GPU]
    lines: dict[str, list[float | None]] = {"A": [], "B": []}
    for size in BOUND_SIZES:
        m = resolve({"model.preset": f"pythia-{size}"}).model
        step = STEP_TOKENS.get(size, SMALL_STEP)
        per_token = plan.flops(m, 2048).causal
        for name, bound in (("A", plan.bound_a(m, 2048, step, card)),
                            ("B", plan.bound_b(m, 2048, step, card))):  # fmt: skip
            share = plan.mfu(per_token, bound.tokens_per_s, card) if bound else None
            lines[name].append(share and round(100 * share, 3))
    measured: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        ours = row["bench"] == "train" and row["status"] == "ok" and card.device == row["device"]
        if (
            ours
            and row.get("mfu_causal")
            and not row.get("sustained")
            and row["size"] in BOUND_SIZES
        ):
            measured[row["impl"]][row["size"]] = round(100 * row["mfu_causal"], 3)
    title = f"Training MFU on one {card.name}: bounds by arithmetic"
    title += " and measurements" if measured else "; nothing measured yet"
    labels = {
        "A": f"bound A: {card.product / 1e12:.0f} TFLOP/s, {card.copy / 1e12:.1f} TB/s",
        "B": "bound B: published attention rates, products by their shapes",
    }
    data = {"sizes": BOUND_SIZES, "bounds": lines, "labels": labels, "measured": dict(measured)}
    return Figure("bench-bounds.png", title, data, _draw_bounds)


def _draw_bounds(data: Any) -> Canvas:
    canvas, axes = _canvas(1, 1, 7.2, 3.9)
    axis: Axes = axes[0, 0]
    places = range(len(data["sizes"]))
    for name, style in (("A", "-"), ("B", "--")):
        label, values = data["labels"][name], data["bounds"][name]
        axis.plot(places, values, style, color=GUIDE, linewidth=1.4, label=label)
    impls = _in_order(set(data["measured"]))
    for impl in impls:
        points = [(places[data["sizes"].index(s)], v) for s, v in data["measured"][impl].items()]
        axis.plot(*zip(*sorted(points), strict=True), "o", color=_colour(impl, impls), label=impl)
    axis.set_xticks(places, data["sizes"])
    axis.set_ylim(0, 100)
    axis.set_ylabel("MFU, % of 989 TFLOP/s (causal)", fontsize=9)
    axis.set_xlabel("Pythia size", fontsize=9)
    _legend(canvas, axis.get_legend_handles_labels()[0], columns=3)
    return canvas


def _absent(rows: Sequence[Row], bench: str, key: str) -> dict[tuple[str, str], str]:
    """(implementation, row[key]) -> status of what has no figure at all, so that it is shown."""
    mine = [row for row in rows if row["bench"] == bench and "impl" in row]
    ok = {(row["impl"], row[key]) for row in mine if row["status"] == "ok"}
    others = {(row["impl"], row[key]): row["status"] for row in mine if row["status"] != "ok"}
    return {pair: status for pair, status in others.items() if pair not in ok}


# --- training -------------------------------------------------------------------------------------


def _training(device: str, rows: Sequence[Row]) -> Figure | None:
    from bench.report import training

    merged = [row for row in training(rows) if not row.get("sustained")]
    if not merged:
        return None
    absent = _absent(rows, "train", "size")
    sizes = [s for s in _sizes() if s in {row["size"] for row in merged} | {s for _, s in absent}]
    data: dict[str, Any] = {"sizes": sizes, "bound": {}, "impls": {}}
    data["absent"] = [[impl, size, status] for (impl, size), status in absent.items()]
    for impl in _in_order({row["impl"] for row in merged} | {impl for impl, _ in absent}):
        mine = {row["size"]: row for row in merged if row["impl"] == impl}
        found = [mine.get(size) for size in sizes]
        data["impls"][impl] = {
            "rate": [row and row["tokens_per_s"] for row in found],
            "low": [row and 1e3 * row["tokens"] / row["ms_p80"] for row in found],
            "high": [row and 1e3 * row["tokens"] / row["ms_p20"] for row in found],
            "memory": [row and row["peak_gb"] for row in found],
        }
    card = plan.card(device)
    for row in merged if card else ():
        m = resolve({"model.preset": f"pythia-{row['size']}"}).model
        bound = plan.bound_a(m, row["positions"], row["tokens"], card)  # type: ignore[arg-type]
        data["bound"][row["size"]] = bound.tokens_per_s
    title = f"Training step on {device}"
    return Figure(f"bench-train-{_slug(device)}.png", title, data, _draw_training)


def _sizes() -> list[str]:
    return ["tiny", *SIZES]


def _draw_training(data: Any) -> Canvas:
    """Few sizes: bars from zero with their figures; many: points over decades."""
    canvas, axes = _canvas(1, 2, 9.0, 3.6)
    impls, sizes = list(data["impls"]), data["sizes"]
    few = len(impls) * len(sizes) <= LABELLED
    width = 0.8 / len(impls)
    for axis, what, label in ((axes[0, 0], "rate", "tokens/s"), (axes[0, 1], "memory", "GB")):
        for n, impl in enumerate(impls):
            shift = (n - (len(impls) - 1) / 2) * width
            mine = data["impls"][impl]
            points = [(i + shift, v) for i, v in enumerate(mine[what]) if v]
            _marks(axis, points, width if few else 0.0, impl, _colour(impl, impls))
            if what == "rate":
                ends = [(i, *e) for i, e in enumerate(zip(mine["low"], mine["high"], strict=True))]
                for i, low, high in (e for e in ends if e[1]):
                    axis.vlines(i + shift, low, high, color="black", linewidth=0.9)
            for name, size, status in data["absent"]:
                if name == impl:
                    axis.text(
                        sizes.index(size) + shift, 0.02, status, rotation=90, fontsize=6,
                        ha="center", color=_colour(impl, impls),
                        transform=axis.get_xaxis_transform(),
                    )  # fmt: skip
        axis.set_yscale("linear" if few else "log")
        axis.margins(y=0.12)
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_ylabel(
            f"{label}, 20th to 80th percentile" if what == "rate" else f"{label} at most"
        )
        axis.yaxis.label.set_size(9)
    for n, (size, rate) in enumerate(data["bound"].items()):
        place = sizes.index(size)
        axes[0, 0].hlines(
            rate, place - 0.45, place + 0.45, color=GUIDE, linewidth=1.4,
            label=None if n else "bound A",
        )  # fmt: skip
    _legend(canvas, axes[0, 0].get_legend_handles_labels()[0])
    return canvas


def _marks(
    axis: Axes, points: list[tuple[float, float]], width: float, impl: str, colour: str
) -> None:
    """Bars of a width with their figures, points where it is 0."""
    places, values = [x for x, _ in points], [y for _, y in points]
    if not width:
        axis.plot(places, values, "o", markersize=4, color=colour, label=impl)
        return
    bars = axis.bar(places, values, width * 0.92, color=colour, label=impl)
    axis.bar_label(
        bars, [_short(v) for v in values], fontsize=7, label_type="center", color="white"
    )


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# --- kernels --------------------------------------------------------------------------------------


def _kernels(device: str, rows: Sequence[Row]) -> Figure | None:
    """Share of the limit measured in the same run, by size; a panel a kernel and pass."""
    panels: defaultdict[str, defaultdict[str, dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if row["bench"] == "kernel" and row["status"] == "ok" and row.get("frac_of_limit"):
            panel = panels[f"{row['kernel']} {row['part']}, {row['l2']}"]
            panel[row["impl"]][row["size"]] = round(100 * row["frac_of_limit"], 3)
    if not panels:
        return None
    absent: defaultdict[str, set[str]] = defaultdict(set)
    for (impl, kernel), status in _absent(rows, "kernel", "kernel").items():
        absent[kernel].add(f"{impl} ({status})")
    title = f"Kernels on {device}: % of the product or copy rate of the same run"
    data = {"panels": panels, "impls": _in_order({i for p in panels.values() for i in p})}
    data["absent"] = {kernel: sorted(found) for kernel, found in absent.items()}
    return Figure(f"bench-kernels-{_slug(device)}.png", title, data, _draw_kernels)


def _draw_kernels(data: Any) -> Canvas:
    panels, impls = data["panels"], data["impls"]
    columns = 4
    lines = -(-len(panels) // columns)
    canvas, axes = _canvas(lines, columns, 3.0 * columns, 2.3 * lines + 0.6)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        sizes = [s for s in _sizes() if any(s in found for found in panel.values())]
        for impl in _in_order(set(panel)):
            points = [(sizes.index(s), v) for s, v in panel[impl].items()]
            axis.plot(
                *zip(*sorted(points), strict=True), "o-", markersize=3, linewidth=1.2,
                color=_colour(impl, impls),
            )  # fmt: skip
        axis.axhline(100, color=GUIDE, linewidth=1, linestyle="--")
        axis.set_xticks(range(len(sizes)), sizes, rotation=45)
        axis.set_ylim(0, None)
        axis.set_title(name, fontsize=8, loc="left")
        missing = data["absent"].get(name.rpartition(", ")[0].rpartition(" ")[0], [])
        axis.text(
            0.02, 0.03, "\n".join(missing), transform=axis.transAxes, fontsize=6, va="bottom",
            color=GUIDE,
        )  # fmt: skip
    handles = [
        plt.Line2D([], [], color=_colour(i, impls), marker="o", markersize=4, label=i)
        for i in impls
    ]
    handles.append(plt.Line2D([], [], color=GUIDE, linestyle="--", label="limit"))
    _legend(canvas, handles)
    return canvas
