"""The data path: building the gpt-neox order, and reading batches, each on one core.

    python -m bench.bench_data [--documents 20000000] [--json]

The order is built over a real ``.idx`` of lognormal document sizes (mean 1,587 tokens, the Pile's)
beside a sparse ``.bin``; 34 bytes a document of temporary disk. Reading is measured on data that is
already in the page cache, through the loader, with the vocabulary check and the digest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pythia_fast.data.indexed import IndexedWriter, beside, write_index
from pythia_fast.data.loader import Loader
from pythia_fast.data.order import OVERSAMPLING, open_rows

PILE_DOCUMENTS, PILE_TOKENS = 210_500_000, 334_000_000_000  # semantics of the original run
MEAN_TOKENS = PILE_TOKENS / PILE_DOCUMENTS
SEQ_LEN, BATCH, STEPS, VOCABULARY = 2048, 1024, 143_000, 50_304
READ_TOKENS = 200_000_000  # of the file that the loader reads: 0.4 GB
GOAL = 30_000_000  # tokens/s on one core: 20 × what the fastest model here eats


def lognormal_sizes(documents: int, mean: float) -> Iterator[np.ndarray]:
    """Document sizes >= 1 of the given mean, int32, in blocks."""
    random = np.random.default_rng(0)
    sigma = 1.2
    for first in range(0, documents, 1 << 22):
        count = min(1 << 22, documents - first)
        sizes = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        yield np.clip(sizes, 1, 1_000_000).astype(np.int32)


def build_order(documents: int) -> dict[str, Any]:
    """Seconds and peak resident memory of a fresh process that opens the rows of a new dataset."""
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as name:
        prefix = Path(name) / "document"
        sizes = np.concatenate(list(lognormal_sizes(documents, MEAN_TOKENS)))
        tokens = int(sizes.sum(dtype=np.int64))
        with beside(prefix, ".idx").open("wb") as file:
            write_index(file, np.dtype("<u2"), sizes)
        with beside(prefix, ".bin").open("wb") as file:
            file.truncate(2 * tokens)  # sparse: the builder reads none of it
        steps = min(STEPS, int((tokens - 1) // SEQ_LEN / OVERSAMPLING) // BATCH)
        command = [sys.executable, "-m", "bench.bench_data", "--open", str(prefix), str(steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        written = sum(path.stat().st_size for path in Path(name).glob("*.npy"))
    return {"documents": documents, "index_gb": written / 1e9, **json.loads(done.stdout)}


def open_once(prefix: str, steps: int) -> dict[str, Any]:
    """Runs in the fresh process: builds the order, then opens it again from its files."""
    before = peak_rss_gb()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        rows = open_rows(prefix, order="gpt-neox", steps=steps, batch_size=BATCH)
        seconds.append(time.perf_counter() - start)
    return {
        "samples": len(rows),
        "build_s": seconds[0],
        "reopen_s": seconds[1],
        "import_rss_gb": before,
        "peak_rss_gb": peak_rss_gb(),
    }


def peak_rss_gb() -> float:
    """The most that this process has held, mapped pages of files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def write_tokens(prefix: Path, mean: float) -> None:
    """READ_TOKENS random tokens in documents of the given mean size."""
    random = np.random.default_rng(1)
    with IndexedWriter(prefix, "u2") as writer:
        written = 0
        while written < READ_TOKENS:
            sizes = next(lognormal_sizes(int(1e7 / mean), mean))
            tokens = random.integers(0, VOCABULARY, int(sizes.sum()), np.uint16)
            writer.add_many(tokens, sizes)
            written += len(tokens)


def write_rows(prefix: Path) -> None:
    """The same amount as preshuffled rows, without an index."""
    rows = READ_TOKENS // (SEQ_LEN + 1)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, rows * (SEQ_LEN + 1), np.uint16)
    tokens.tofile(beside(prefix, ".bin"))


def read_speed(prefix: Path, order: str) -> dict[str, Any]:
    """Speed of one pass through the loader, after one pass that fills the page cache."""
    rows = open_rows(prefix, order=order, steps=1, batch_size=BATCH)
    steps = len(rows) // BATCH
    for _ in range(2):
        start = time.perf_counter()
        with Loader(rows, BATCH, 0, steps, VOCABULARY) as loader:
            tokens = sum(batch.tokens.size for batch in loader)
        seconds = time.perf_counter() - start
    return {
        "order": order,
        "rows_per_s": steps * BATCH / seconds,
        "tokens_per_s": tokens / seconds,
        "gb_per_s": 2 * tokens / seconds / 1e9,
        "goal_ratio": tokens / seconds / GOAL,
    }


def read_cases() -> Iterator[dict[str, Any]]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as name:
        for mean in (MEAN_TOKENS, 100):
            prefix = Path(name) / f"mean{mean:.0f}"
            write_tokens(prefix, mean)
            yield read_speed(prefix, "gpt-neox") | {"mean_tokens": round(mean)}
        yield read_speed(prefix, "sequential") | {"mean_tokens": round(mean)}
        write_rows(Path(name) / "preshuffled")
        yield read_speed(Path(name) / "preshuffled", "preshuffled")


def results(documents: int) -> Iterator[dict[str, Any]]:
    machine = {"cpu": cpu_name(), "python": platform.python_version(), "numpy": np.__version__}
    measured = build_order(documents)
    yield {"case": "order, measured"} | measured | machine
    if documents < PILE_DOCUMENTS:
        yield {"case": "order, arithmetic only"} | scaled(measured, PILE_DOCUMENTS / documents)
    for case in read_cases():
        yield {"case": "read, measured"} | case | machine


def scaled(measured: dict[str, Any], factor: float) -> dict[str, Any]:
    """In proportion to the documents: an upper bound of memory, for the blocks do not grow."""
    base = measured["import_rss_gb"]
    return {
        "documents": round(measured["documents"] * factor),
        "samples": round(measured["samples"] * factor),
        "build_s": measured["build_s"] * factor,
        "peak_rss_gb": base + (measured["peak_rss_gb"] - base) * factor,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


UNITS = {
    "documents": ",",
    "samples": ",",
    "build_s": ".1f s",
    "reopen_s": ".1f s",
    "peak_rss_gb": ".2f GB peak RSS",
    "index_gb": ".2f GB of index files",
    "mean_tokens": ", tokens a document",
    "rows_per_s": ",.0f rows/s",
    "tokens_per_s": ",.0f tokens/s",
    "gb_per_s": ".2f GB/s",
    "goal_ratio": ".1f × the goal",
}


def line(result: dict[str, Any]) -> str:
    """One result in words, every number with its unit."""
    words = [result["case"], *([result["order"]] if "order" in result else [])]
    for key, form in UNITS.items():
        if key in result:
            spec, _, unit = form.partition(" ")
            words.append(f"{result[key]:{spec}} {unit or key}")
    return " | ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)  # the fresh process
    arguments = parser.parse_args()
    if arguments.open:
        prefix, steps = arguments.open
        print(json.dumps(open_once(prefix, int(steps))))
        return
    for result in results(arguments.documents):
        print(json.dumps(result) if arguments.json else line(result), flush=True)


if __name__ == "__main__":
    main()
