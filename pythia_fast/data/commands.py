"""The functions behind ``pythia-fast data``: they return or yield results and print nothing.

``build`` stands in `pythia_fast.data.build`; the others are here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pythia_fast.data.files import ahead, progress, publish, sha256_file
from pythia_fast.data.indexed import IndexedDataset, beside, bin_paths, split_prefix
from pythia_fast.data.loader import RUNNING_START, Batch, read_batch, running_digest
from pythia_fast.data.order import Rows, open_rows
from pythia_fast.errors import CheckError, InputError

if TYPE_CHECKING:
    from pythia_fast.config import Config

COPY_BYTES = 1 << 24


def rows_from(config: Config) -> Rows:
    """The rows that a run of this configuration trains on."""
    return open_rows(
        config.data.prefix,
        order=config.data.order,
        seq_len=config.data.seq_len,
        seed=config.train.seed,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        cache=config.data.cache or None,
    )


def valid_rows_from(config: Config) -> Rows | None:
    """The held-out rows in file order, at least one; None when the configuration names none."""
    if not config.data.valid_prefix:
        return None
    return open_rows(
        config.data.valid_prefix,
        order="sequential",
        seq_len=config.data.seq_len,
        steps=1,
        batch_size=1,
    )


def view(config: Config, start_step: int, stop_step: int) -> Iterator[dict[str, Any]]:
    """{"step", "row", "tokens"} of every row of steps [start_step, stop_step)."""
    for batch in _batches(config, start_step, stop_step):
        for row, tokens in enumerate(batch.tokens.tolist(), start=batch.first_row):
            yield {"step": batch.step, "row": row, "tokens": tokens}


def digest(
    config: Config, start: int, stop: int, running: str = RUNNING_START
) -> Iterator[dict[str, Any]]:
    """{"step", "first_row", "last_row", "digest", "running"} of steps [start, stop), as a ledger.

    running: the ledger's value after step start − 1; the default belongs to start = 0.
    """
    for batch in _batches(config, start, stop):
        running = running_digest(running, batch.digest)
        yield {
            "step": batch.step,
            "first_row": batch.first_row,
            "last_row": batch.last_row,
            "digest": batch.digest,
            "running": running,
        }


def _batches(config: Config, start: int, stop: int) -> Iterator[Batch]:
    steps, size, vocabulary = config.train.steps, config.train.batch_size, config.model.vocab_size
    if not 0 <= start < stop <= steps:
        raise InputError(f"steps {start}:{stop} are not within the {steps} steps of the run")
    rows = rows_from(config)
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        yield from ahead(
            pool,
            lambda step: read_batch(rows, step, size, vocabulary),
            range(start, stop),
            depth=2 * workers,
        )


def join(source: str | Path, out: str | Path) -> dict[str, Any]:
    """Concatenates the shards of prefix `source` to `out`.bin, and copies the ``.idx`` if any.

    The index is checked against the bytes of all shards before anything is written. Returns
    {"shards", "bytes", "bin", "idx"}.
    """
    source, out = split_prefix(source), split_prefix(out)
    shards = bin_paths(source)
    index, target = beside(source, ".idx"), beside(out, ".bin")
    if target in shards:
        raise InputError(f"{target}: is the input itself")
    indexed = index.is_file()
    if indexed:
        IndexedDataset(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    total = sum(path.stat().st_size for path in shards)
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise InputError(f"{out.parent}: {free} bytes free, {total} needed")
    with (
        progress(f"joining {len(shards)} shards", total, "bytes") as advance,
        publish(target) as joined,
    ):
        for shard in shards:
            with shard.open("rb") as file:
                while block := file.read(COPY_BYTES):
                    joined.write(block)
                    advance(len(block), "")
    if indexed and index != beside(out, ".idx"):
        with publish(beside(out, ".idx")) as file:
            file.write(index.read_bytes())
    if target.stat().st_size != total:
        raise CheckError(f"{target}: {target.stat().st_size} bytes, the shards have {total}")
    return {
        "shards": len(shards),
        "bytes": total,
        "bin": str(target),
        "idx": str(beside(out, ".idx")) if indexed else None,
    }


def verify(
    paths: Sequence[str | Path], checksums: str | Path | None = None
) -> Iterator[dict[str, Any]]:
    """Checks data files; yields one result each, then raises CheckError if any was wrong.

    With `checksums` (lines of "sha256 name" in either order, or a JSON object name → sha256):
    {"path", "ok", "sha256", "expected"} of the paths named, of all listed files in a directory
    named, or, with no paths, of all listed files beside the list. Without: {"path", "ok",
    "documents", "tokens"} or {"path", "ok", "error"} of each ``.bin/.idx`` pair.
    """
    wrong: list[str] = []
    for result in _index_checks(paths) if checksums is None else _sums(paths, Path(checksums)):
        if not result["ok"]:
            wrong.append(result["path"])
        yield result
    if wrong:
        raise CheckError(f"{len(wrong)} wrong: {', '.join(wrong)}")


def _index_checks(paths: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    prefixes: list[Path] = []
    for path in map(Path, paths):
        prefixes += sorted(path.rglob("*.idx")) if path.is_dir() else [path]
    if not prefixes:
        raise InputError("no .idx file to verify")
    for prefix in prefixes:
        index = beside(split_prefix(prefix), ".idx")
        if not index.is_file():
            raise InputError(f"{index}: no such file; without one, give a file of checksums")
        try:
            dataset = IndexedDataset(prefix)
        except InputError as error:
            yield {"path": str(index), "ok": False, "error": str(error)}
        else:
            tokens = len(dataset.tokens)
            yield {"path": str(index), "ok": True, "documents": len(dataset), "tokens": tokens}


def _sums(paths: Sequence[str | Path], checksums: Path) -> Iterator[dict[str, Any]]:
    expected = read_checksums(checksums)
    targets: list[tuple[Path, str]] = []
    for path in map(Path, paths or [checksums.parent]):
        if path.is_dir():
            targets += [(path / name, wanted) for name, wanted in expected.items()]
        elif path.name in expected:
            targets.append((path, expected[path.name]))
        else:
            raise InputError(f"{checksums}: has no checksum of {path.name}")
    sizes = [path.stat().st_size if path.is_file() else 0 for path, _ in targets]
    workers = len(os.sched_getaffinity(0))
    with (
        progress(f"hashing {len(targets)} files", sum(sizes), "bytes") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):

        def hashed(path: Path) -> str | None:
            return sha256_file(path, advance) if path.is_file() else None

        sums = ahead(pool, hashed, (path for path, _ in targets), depth=workers)
        for (path, wanted), sha256 in zip(targets, sums, strict=True):
            ok = sha256 == wanted
            yield {"path": str(path), "ok": ok, "sha256": sha256, "expected": wanted}


def read_checksums(path: Path) -> dict[str, str]:
    """name → sha256 of a list in the form of sha256sum, its reverse, or a JSON object."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    text = path.read_text()
    if path.suffix == ".json":
        try:
            pairs = [(number, *pair) for number, pair in enumerate(json.loads(text).items())]
        except (ValueError, AttributeError):
            raise InputError(f"{path}: not a JSON object of name and sha256") from None
    else:
        pairs = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                first, _, second = line.strip().partition(" ")
                name, sha256 = (second, first) if _is_sha256(first) else (first, second)
                pairs.append((number, name.strip().removeprefix("*"), sha256.strip()))
    for number, name, sha256 in pairs:
        if not _is_sha256(sha256):
            raise InputError(f"{path}:{number}: {name} has no sha256 of 64 hex digits")
    return {name: sha256.lower() for _, name, sha256 in pairs}


def _is_sha256(word: Any) -> bool:
    return isinstance(word, str) and re.fullmatch(r"[0-9a-fA-F]{64}", word) is not None
