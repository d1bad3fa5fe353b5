"""The data path: building the gpt-neox order, and reading batches, each on one core.

    python -m bench.suite --only data

The order is built over a real ``.idx`` of lognormal document sizes (mean 1,587 tokens, the Pile's)
beside a sparse ``.bin``; 34 bytes a document of temporary disk. Reading is measured on data that is
already in the page cache, through the loader, with the vocabulary check and the digest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.processes import Case
from bench.record import Row, times
from pythia_fast.data.indexed import IndexedWriter, beside, write_index
from pythia_fast.data.loader import Loader
from pythia_fast.data.order import OVERSAMPLING, open_rows

PILE_DOCUMENTS, PILE_TOKENS = 210_500_000, 334_000_000_000  # of the original run
MEAN_TOKENS = PILE_TOKENS / PILE_DOCUMENTS
SEQ_LEN, BATCH, STEPS, VOCABULARY = 2048, 1024, 143_000, 50_304
READ_TOKENS = 200_000_000  # of the file that the loader reads: 0.4 GB
PASSES = 5
READS = (("gpt-neox", round(MEAN_TOKENS)), ("gpt-neox", 100), ("preshuffled", 0))


def cases(small: bool = False) -> Iterator[Case]:
    """Reading, then the order of 20 million documents, then that of the whole Pile."""
    tokens = 20 * BATCH * (SEQ_LEN + 1) // 10 if small else READ_TOKENS
    for order, mean in READS:
        what: Row = {"kind": "read", "order": order, "mean_tokens": mean, "read_tokens": tokens}
        documents = f" {mean} tokens a document" if mean else ""
        yield _case(f"loader {order}{documents}", what, 120.0)
    for count in (200_000,) if small else (20_000_000, PILE_DOCUMENTS):
        yield _case(f"order of {count} documents", {"kind": "order", "documents": count}, 400.0)


def _case(name: str, what: Row, limit_s: float) -> Case:
    return Case("bench.bench_data", name, {"bench": "data", **what}, what, limit_s)


def measure(kind: str, **what: Any) -> Iterator[Row]:
    yield build_order(**what) if kind == "order" else read_speed(**what)


def lognormal_sizes(documents: int, mean: float) -> Iterator[np.ndarray]:
    """Document sizes >= 1 of the given mean, int32, in blocks."""
    random = np.random.default_rng(0)
    sigma = 1.2
    for first in range(0, documents, 1 << 22):
        count = min(1 << 22, documents - first)
        sizes = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        yield np.clip(sizes, 1, 1_000_000).astype(np.int32)


def build_order(documents: int) -> Row:
    """Milliseconds and peak resident memory of a fresh process that opens a new dataset's rows."""
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as name:
        prefix = Path(name) / "document"
        sizes = np.concatenate(list(lognormal_sizes(documents, MEAN_TOKENS)))
        tokens = int(sizes.sum(dtype=np.int64))
        with beside(prefix, ".idx").open("wb") as file:
            write_index(file, np.dtype("<u2"), sizes)
        with beside(prefix, ".bin").open("wb") as file:
            file.truncate(2 * tokens)  # sparse: the builder reads none of it
        steps = min(STEPS, int((tokens - 1) // SEQ_LEN / OVERSAMPLING) // BATCH)
        command = [sys.executable, "-m", "bench.bench_data", str(prefix), str(steps)]
        where = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=where)
        written = sum(path.stat().st_size for path in Path(name).glob("*.npy"))
    opened = json.loads(done.stdout)
    return {"index_gb": written / 1e9, **times([1e3 * opened.pop("build_s")]), **opened}


def open_once(prefix: str, steps: int) -> Row:
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
        "import_gb": before,
        "peak_gb": peak_rss_gb(),
    }


def peak_rss_gb() -> float:
    """The most that this process has held, mapped pages of files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def write_tokens(prefix: Path, mean: float, wanted: int) -> None:
    """At least `wanted` random tokens in documents of the given mean size."""
    random = np.random.default_rng(1)
    with IndexedWriter(prefix, "u2") as writer:
        written = 0
        while written < wanted:
            sizes = next(lognormal_sizes(int(min(wanted, 1e7) / mean) + 1, mean))
            tokens = random.integers(0, VOCABULARY, int(sizes.sum()), np.uint16)
            writer.add_many(tokens, sizes)
            written += len(tokens)


def write_rows(prefix: Path, wanted: int) -> None:
    """As many tokens as preshuffled rows, without an index."""
    rows = wanted // (SEQ_LEN + 1)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, rows * (SEQ_LEN + 1), np.uint16)
    tokens.tofile(beside(prefix, ".bin"))


def read_speed(order: str, mean_tokens: int, read_tokens: int) -> Row:
    """PASSES through the loader on one core, after one that fills the page cache."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as name:
        prefix = Path(name) / "document"
        if order == "preshuffled":
            write_rows(prefix, read_tokens)
        else:
            write_tokens(prefix, mean_tokens, read_tokens)
        rows = open_rows(prefix, order=order, steps=1, batch_size=BATCH)
        steps = len(rows) // BATCH
        milliseconds = []
        for _ in range(PASSES + 1):
            start = time.perf_counter()
            with Loader(rows, BATCH, 0, steps, VOCABULARY) as loader:
                tokens = sum(batch.tokens.size for batch in loader)
            milliseconds.append(1e3 * (time.perf_counter() - start))
    row = times(milliseconds[1:])
    seconds = row["ms_p50"] / 1e3
    rates = {"rows_per_s": steps * BATCH / seconds, "tokens_per_s": tokens / seconds}
    return {**row, **rates, "gbps": 2 * tokens / seconds / 1e9}


if __name__ == "__main__":
    print(json.dumps(open_once(sys.argv[1], int(sys.argv[2]))))
