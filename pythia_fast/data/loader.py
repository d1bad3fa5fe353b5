"""Batches read ahead by one thread, each with its digest, so that the trainer never waits for one.

The digest of a batch is over token ids and nothing else: two runs saw the same data in the same
order exactly when their running digests agree, however the data were stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from pythia_fast.data.files import ahead
from pythia_fast.data.indexed import Tokens
from pythia_fast.data.order import Rows
from pythia_fast.errors import InputError

RUNNING_START = "0" * 64


def batch_digest(tokens: Tokens) -> str:
    """Hex sha256 of the token ids as little-endian uint32 in C order, whatever their dtype."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<u4").data).hexdigest()


def running_digest(previous: str, digest: str) -> str:
    """Hex sha256 of previous + digest (ASCII hex); the first `previous` is RUNNING_START."""
    return hashlib.sha256((previous + digest).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Share:
    """What one of several data-parallel processes trains on: its microbatches of a step, in order.

    With D processes of b rows a microbatch, microbatch m of process d is rows [m·D·b + d·b, + b).
    Source: GPT-NeoX v1.0 samplers.py:127-165. The process that keeps the ledger reads all rows; one
    in the middle of a pipeline needs none.
    """

    micro_batch_size: int
    copies: int
    copy: int
    ledger: bool
    reads: bool = True

    def ranges(self, batch_size: int) -> list[slice]:
        b = self.micro_batch_size
        starts = range(self.copy * b, batch_size, self.copies * b)
        return [slice(start, start + b) for start in starts]


@dataclass(frozen=True)
class Batch:
    """What step `step` trains on: rows first_row to last_row, both included.

    tokens [rows, seq_len + 1], ids in the dtype of the file: this process's share of them. digest:
    of all rows, "" on a process that does not keep the ledger.
    """

    step: int
    tokens: Tokens
    first_row: int
    last_row: int
    digest: str


def read_batch(
    rows: Rows, step: int, batch_size: int, vocab_size: int, share: Share | None = None
) -> Batch:
    """The batch of one step. Raises InputError naming the first id outside the vocabulary."""
    first, last = batch_size * step, batch_size * (step + 1)
    if share is not None and not share.reads:
        return Batch(step, rows.tokens(first, first), first, last - 1, "")
    ranges = [slice(0, batch_size)] if share is None else share.ranges(batch_size)
    if share is None or share.ledger:
        whole = rows.tokens(first, last)
        _check_ids(whole, vocab_size, step, first)
        tokens = whole if share is None else np.concatenate([whole[r] for r in ranges])
        return Batch(step, tokens, first, last - 1, batch_digest(whole))
    parts = [rows.tokens(first + r.start, first + r.stop) for r in ranges]
    for part, r in zip(parts, ranges, strict=True):
        _check_ids(part, vocab_size, step, first + r.start)
    return Batch(step, np.concatenate(parts), first, last - 1, "")


def _check_ids(tokens: Tokens, vocab_size: int, step: int, first: int) -> None:
    if tokens.size and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        row, position = np.argwhere((tokens >= vocab_size) | (tokens < 0))[0]
        raise InputError(
            f"step {step}, row {first + row}, position {position}: token id"
            f" {tokens[row, position]} is outside the vocabulary of {vocab_size}"
        )


class Loader:
    """Iterates over the batches of steps [first_step, last_step), `depth` of them read ahead.

    An error of the reading thread is raised where its batch would have been returned. Use it in a
    ``with`` block, or call close(), which ends the thread.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        first_step: int,
        last_step: int,
        vocab_size: int,
        depth: int = 4,
        share: Share | None = None,
    ) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._batches = ahead(
            self._pool,
            lambda step: read_batch(rows, step, batch_size, vocab_size, share),
            range(first_step, last_step),
            depth,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def close(self) -> None:
        """Drops what was read ahead and ends the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
