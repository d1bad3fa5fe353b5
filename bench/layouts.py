"""`python -m bench.layouts` writes docs/layouts.md and the timelines of 12b from the plan's model.

Nothing in them is measured. A test fails where the files and the model disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.figures import Figure
from bench.op import SIZES
from pythia_fast import recommend
from pythia_fast.config import Config, load
from pythia_fast.report import timeline

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = Path("layouts.md")
CARDS = ("A100", "H100", "H200")
GPUS = (8, 64, 256)
DRAWN = {64: 4, 256: 2}  # GPUs: rows of a microbatch
PIPELINE = 8  # of the timelines
HEAD = (
    "| size | GPUs | data × tensor × pipeline | shard | rows | schedule | GB | ms a step "
    "| tokens/s | hours | MFU, causal | bubble | exposed |"
)
INTRODUCTION = """# Layouts of the suite over many GPUs

**Estimates from a model, not measurements.** What `pythia-fast plan CONFIG --gpus N --gpu NAME
--recipe modern` recommends for each published size: 2,097,152 tokens a step, 143,000 steps, bf16,
nothing recomputed. Kernels at the rates of large products and copies, communication by NCCL's ring
model: `pythia_fast/stages.py`, `communication.py` and `estimate.py` say how and from which sources.
A layout within 1 % of the fastest is preferred where it is simpler; 5 % of the memory stay free.
What collectives take from the kernels beside them is not counted. Written by
`python -m bench.layouts`; a test fails where this page and the model disagree.

rows: of a microbatch. GB: of the GPU that needs most. bubble: share of
the step in which a pipeline fills and drains. exposed: share in which communication is waited for.
"""
DRAWINGS = """
## A step on a pipeline, simulated

`pythia_fast/simulation.py` runs the operations in the order of torch.distributed.pipelining with
these costs (`plan --timeline FILE.png`). The slowest rank decides; layers do not divide evenly.
gpipe keeps every microbatch; zero-bubble moves the weights' half of the backward into the gaps.
"""


def config(size: str, *flags: str) -> Config:
    return load(REPOSITORY / f"configs/pythia-{size}.toml", ["--recipe", "modern", *flags])


def line(size: str, gpus: int, card: str) -> str:
    row = recommend.rows(config(size), gpus, card)[0]
    step = row["seconds_per_step"]
    cells = (
        size, gpus, f"{row['data']} × {row['tensor']} × {row['pipeline']}",
        row["shard"] if row["data"] > 1 else "", row["micro_batch_size"],
        recommend.schedule_of(row),
        f"{row['memory_bytes']['total'] / 1e9:.1f}", f"{1e3 * step['total']:,.0f}",
        f"{row['tokens_per_s']:,.0f}", f"{row['hours']:,.1f}", f"{row['mfu_causal']:.1%}",
        f"{row['bubble_share']:.1%}", f"{step['exposed'] / step['total']:.1%}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def page() -> str:
    """docs/layouts.md."""
    lines = [INTRODUCTION]
    for card in CARDS:
        links = recommend.fabric(card).name
        lines += [f"## {card} ({links})", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
        lines += [line(size, gpus, card) for size in SIZES for gpus in GPUS]
        lines.append("")
    lines.append(DRAWINGS.lstrip())
    lines += [f"![{figure.title}]({figure.file})\n" for figure in figures()]
    return "\n".join(lines)


def figures() -> list[Figure]:
    """12b on a pipeline of 8, under each schedule."""
    found = []
    for gpus, rows in DRAWN.items():
        flags = f"--parallel.pipeline {PIPELINE} --train.micro_batch_size {rows}".split()
        data: dict[str, Any] = timeline.data(config("12b", *flags), gpus, "H100")
        found.append(Figure(f"pipeline-12b-{gpus}.png", data["title"], data, timeline.draw))
    return found


def write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page(), encoding="utf-8")
    return [folder / PAGE, *(figure.save(folder) for figure in figures())]


if __name__ == "__main__":
    for path in write(REPOSITORY / "docs"):
        print(path.relative_to(REPOSITORY))
