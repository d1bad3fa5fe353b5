"""Rows of seq_len + 1 tokens in a fixed order: the pure function (files, order, seed) → row j.

- ``gpt-neox``: what the original trained on (facts: gpt-neox v1.0 gpt2_dataset.py, helpers.cpp).
  With T tokens an epoch, E the smallest number of epochs with (E·T − 1) // L ≥ the rows wanted, and
  one RandomState for both shuffles::

      flat   = concatenation of the documents in doc_idx, all E epochs shuffled as one
      sample k = flat[L·k : L·k + L + 1]                        k < N = (E·T − 1) // L
      row j  = sample shuffle_idx[j]

- ``sequential``: row j = tokens[L·j : L·j + L + 1], documents in file order, never wrapping.
- ``preshuffled``: row j = tokens[(L+1)·j : (L+1)·(j+1)], rows already cut and shuffled; the
  ``.idx`` is optional, and without one the tokens are uint16.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from pythia_fast.data.files import locked, progress, publish
from pythia_fast.data.indexed import (
    IndexedDataset,
    Tokens,
    TokenStream,
    beside,
    bin_paths,
    split_prefix,
)
from pythia_fast.errors import InputError

ORDERS = ("gpt-neox", "preshuffled", "sequential")
OVERSAMPLING = 1.005  # the original asks for 0.5 % more rows than it trains on
DOCUMENTS_A_BLOCK = 1 << 22  # of the index builder: about 100 MB of temporaries
ROWS_A_BLOCK = 64  # of the gather: 1 MB of positions stay in the second-level cache
QUIET_DOCUMENTS = 5_000_000  # fewer than this are indexed in about a second, without a bar


class Rows(Protocol):
    """Rows of seq_len + 1 token ids, in the order of training."""

    @property
    def seq_len(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the identity of data and order, not over the tokens."""
        ...

    def __len__(self) -> int: ...

    def tokens(self, start: int, stop: int) -> Tokens:
        """Rows [start, stop) in the file's integer dtype, [stop − start, seq_len + 1]."""
        ...


def open_rows(
    prefix: str | Path,
    *,
    order: str,
    seq_len: int = 2048,
    seed: int = 1234,
    steps: int,
    batch_size: int,
    cache: str | Path | None = None,
) -> Rows:
    """The rows of a run of `steps` steps of `batch_size` rows; step s takes rows [b·s, b·(s+1)).

    cache: directory of the ``gpt-neox`` index files, default beside the data. Raises InputError for
    a damaged file, a dtype that holds no token ids, or fewer rows than steps·batch_size.
    """
    prefix = split_prefix(prefix)
    wanted = steps * batch_size
    rows: Rows
    if order == "gpt-neox":
        rows = _open_neox(IndexedDataset(prefix), seq_len, seed, wanted, cache)
    elif order == "sequential":
        rows = _open_sequential(IndexedDataset(prefix), seq_len)
    elif order == "preshuffled":
        rows = _open_preshuffled(prefix, seq_len)
    else:
        raise InputError(f"data.order {order!r} is none of {', '.join(ORDERS)}")
    if len(rows) < wanted:
        raise InputError(
            f"{prefix}: {len(rows)} rows of {seq_len + 1} tokens in order {order},"
            f" the run needs {wanted} (steps {steps} × batch size {batch_size})"
        )
    return rows


@dataclass(frozen=True)
class StridedRows:
    """Row j = stream[stride·j : stride·j + seq_len + 1]."""

    stream: TokenStream
    stride: int
    count: int
    seq_len: int
    fingerprint: str

    def __len__(self) -> int:
        return self.count

    def tokens(self, start: int, stop: int) -> Tokens:
        _check_range(start, stop, self.count)
        if start == stop:
            return np.empty((0, self.seq_len + 1), self.stream.dtype)
        width = self.seq_len + 1
        flat = self.stream.slice(self.stride * start, self.stride * (stop - 1) + width)
        windows = np.lib.stride_tricks.sliding_window_view(flat, width)
        return np.array(windows[:: self.stride], order="C")


@dataclass(frozen=True)
class NeoxRows:
    """Row j = sample shuffle_idx[j] of the documents in the order of doc_idx.

    doc_idx int32 [E·S]; sample_idx int32 [N + 1, 2], (position in doc_idx, token in that document)
    where sample k begins; shuffle_idx uint32 [N].
    """

    dataset: IndexedDataset
    doc_idx: NDArray[np.int32]
    sample_idx: NDArray[np.int32]
    shuffle_idx: NDArray[np.uint32]
    seq_len: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def tokens(self, start: int, stop: int) -> Tokens:
        _check_range(start, stop, len(self))
        out = np.empty((stop - start, self.seq_len + 1), self.dataset.dtype)
        for first in range(start, stop, ROWS_A_BLOCK):
            last = min(first + ROWS_A_BLOCK, stop)
            samples = self.shuffle_idx[first:last].astype(np.int64)
            positions = self._positions(samples)
            out[first - start : last - start] = self.dataset.tokens.take(positions)
        return out

    def _positions(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each token of the samples [n] stands in the .bin, [n, seq_len + 1]."""
        (begin, skip), (end, last) = self.sample_idx[samples].T, self.sample_idx[samples + 1].T
        # one piece for each document that a sample touches
        pieces = (end - begin + 1).astype(np.int64)  # [n]
        head = np.cumsum(pieces) - pieces  # first piece of each sample
        tail = head + pieces - 1
        within = np.arange(int(pieces.sum())) - np.repeat(head, pieces)
        document = self.doc_idx[np.repeat(begin, pieces) + within]
        origin = self.dataset.pointers[document] // self.dataset.dtype.itemsize
        length = self.dataset.sizes[document].astype(np.int64)
        # the last token of a sample, `last`, is the first of the next one: it belongs to both
        length[tail] = last + 1
        origin[head] += skip
        length[head] -= skip
        offset = np.cumsum(length) - length  # of each piece in the block of rows
        flat = np.repeat(origin - offset, length)
        flat += np.arange(len(flat))
        return flat.reshape(len(samples), self.seq_len + 1)


def epochs_and_samples(tokens: int, seq_len: int, wanted: int) -> tuple[int, int]:
    """(E, N): the fewest epochs with N = (E·tokens − 1) // seq_len ≥ wanted samples."""
    epochs = max(1, -(-(wanted * seq_len + 1) // tokens))
    return epochs, (epochs * tokens - 1) // seq_len


def _open_neox(
    dataset: IndexedDataset, seq_len: int, seed: int, rows: int, cache: str | Path | None
) -> NeoxRows:
    _check_ids(dataset.path, dataset.dtype)
    total = len(dataset.tokens)
    if total == 0:
        raise InputError(f"{dataset.prefix}: 0 tokens, the run needs {rows} rows")
    epochs, samples = epochs_and_samples(total, seq_len, math.ceil(rows * OVERSAMPLING))
    documents = epochs * len(dataset)
    if documents > np.iinfo(np.int32).max:
        raise InputError(
            f"{dataset.prefix}: {epochs} epochs of {len(dataset)} documents pass the"
            f" {np.iinfo(np.int32).max} that the index format can count"
        )
    name = f"{dataset.prefix.name}_gpt-neox_{samples}ns_{seq_len}sl_{seed}s_{dataset.digest[:16]}"
    arrays = {
        "doc": ((documents,), np.int32),
        "sample": ((samples + 1, 2), np.int32),
        "shuffle": ((samples,), np.uint32),
    }
    index = _cached(
        name,
        arrays,
        dataset.prefix.parent if cache is None else Path(cache),
        lambda paths: build_index(dataset.sizes, epochs, samples, seq_len, seed, paths),
    )
    identity = _fingerprint(
        "gpt-neox", dataset.dtype, total, seq_len, seed=seed, epochs=epochs, idx=dataset.digest
    )
    return NeoxRows(dataset, index["doc"], index["sample"], index["shuffle"], seq_len, identity)


def _open_sequential(dataset: IndexedDataset, seq_len: int) -> StridedRows:
    _check_ids(dataset.path, dataset.dtype)
    total = len(dataset.tokens)
    count = max(0, (total - 1) // seq_len)
    identity = _fingerprint("sequential", dataset.dtype, total, seq_len, idx=dataset.digest)
    return StridedRows(dataset.tokens, seq_len, count, seq_len, identity)


def _open_preshuffled(prefix: Path, seq_len: int) -> StridedRows:
    stream = open_tokens(prefix)
    total, width = len(stream), seq_len + 1
    if total % width:
        raise InputError(
            f"{prefix}: {total} tokens are not whole rows of {width} (seq_len {seq_len} + 1):"
            " truncated, or not preshuffled data"
        )
    identity = _fingerprint("preshuffled", stream.dtype, total, seq_len)
    return StridedRows(stream, width, total // width, seq_len, identity)


def open_tokens(prefix: str | Path) -> TokenStream:
    """All the tokens of a prefix in file order; uint16 where there is no ``.idx``.

    Raises InputError for a damaged file or a dtype that holds no token ids.
    """
    prefix = split_prefix(prefix)
    if not beside(prefix, ".idx").is_file():
        return TokenStream(bin_paths(prefix), np.dtype("<u2"))
    dataset = IndexedDataset(prefix)
    _check_ids(dataset.path, dataset.dtype)
    return dataset.tokens


def build_index(
    sizes: NDArray[np.int32],
    epochs: int,
    samples: int,
    seq_len: int,
    seed: int,
    paths: dict[str, Path],
) -> None:
    """Writes doc_idx, sample_idx and shuffle_idx (.npy), byte-equal to the original's arrays.

    In memory at once: the larger of doc_idx with one block and shuffle_idx, beside mapped sizes.
    """
    documents = len(sizes)
    random = np.random.RandomState(seed)
    quiet = epochs * documents < QUIET_DOCUMENTS
    bar = nullcontext(_silent) if quiet else progress("", 3.0 * epochs * documents, "documents")
    with bar as advance:
        advance(0, "order: shuffling documents")
        doc_idx = np.empty(epochs * documents, np.int32)
        doc_idx.reshape(epochs, documents)[:] = np.arange(documents, dtype=np.int32)
        random.shuffle(doc_idx)
        with publish(paths["doc"]) as file:
            np.save(file, doc_idx)
        advance(epochs * documents, "order: cutting samples")
        with publish(paths["sample"]) as file:
            _npy_header(file, (samples + 1, 2), np.int32)
            for begins, taken in sample_blocks(sizes, doc_idx, samples, seq_len):
                file.write(begins.data)
                advance(taken, "")
        del doc_idx
        advance(0, "order: shuffling samples")
        shuffle_idx = np.arange(samples, dtype=np.uint32)
        random.shuffle(shuffle_idx)  # the same RandomState: its state follows from doc_idx
        with publish(paths["shuffle"]) as file:
            np.save(file, shuffle_idx)
        advance(epochs * documents, "")


def sample_blocks(
    sizes: NDArray[np.int32], doc_idx: NDArray[np.int32], samples: int, seq_len: int
) -> Iterator[tuple[NDArray[np.int32], int]]:
    """The rows of sample_idx, block by block: (begins [n, 2], documents walked).

    Sample k begins at token seq_len·k of the walk: in the first document that ends beyond it.
    """
    done, before = 0, 0  # rows made, tokens walked
    for first in range(0, len(doc_idx), DOCUMENTS_A_BLOCK):
        block = sizes[doc_idx[first : first + DOCUMENTS_A_BLOCK]]
        ends = np.cumsum(block, dtype=np.int64) + before
        stop = min(samples + 1, -(-int(ends[-1]) // seq_len))
        tokens = np.arange(done, stop, dtype=np.int64) * seq_len
        at = np.searchsorted(ends, tokens, side="right")
        begins = np.empty((stop - done, 2), np.int32)
        begins[:, 0] = at + first
        begins[:, 1] = tokens - (ends[at] - block[at])
        if done == 0 and stop:
            begins[0] = 0  # the original begins at document 0 even when that one is empty
        yield begins, len(block)
        done, before = stop, int(ends[-1])


def _cached(
    name: str,
    arrays: dict[str, tuple[tuple[int, ...], Any]],
    directory: Path,
    build: Callable[[dict[str, Path]], None],
) -> dict[str, Any]:
    """The index arrays, mapped; built by one process while the others wait for its lock."""
    paths = {part: directory / f"{name}_{part}_idx.npy" for part in arrays}

    def complete() -> bool:
        return all(path.is_file() for path in paths.values())

    if not complete():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory / f".{name}.lock") as alone:
                if not complete():
                    if alone:  # what a killed builder left
                        for stale in directory.glob(f".{name}_*.tmp"):
                            stale.unlink()
                    build(paths)
        except OSError as error:
            raise InputError(
                f"{directory}: cannot write the index files ({error.strerror}); data.cache names"
                " another directory for them"
            ) from error
    return {part: _load(path, *arrays[part]) for part, path in paths.items()}


def _load(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: damaged index file ({error}); delete it") from error
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype} {array.shape}"
        raise InputError(f"{path}: {found}, expected {np.dtype(dtype)} {shape}; delete it")
    return np.asarray(array)


def _npy_header(file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _fingerprint(order: str, dtype: np.dtype[Any], tokens: int, seq_len: int, **more: Any) -> str:
    identity = {"order": order, "dtype": dtype.str, "tokens": tokens, "seq_len": seq_len, **more}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_ids(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "iu":
        raise InputError(f"{path}: dtype {dtype.name} holds no token ids")


def _check_range(start: int, stop: int, count: int) -> None:
    if not 0 <= start <= stop <= count:
        raise InputError(f"rows [{start}, {stop}) are not within the {count} rows of the data")


def _silent(amount: float, relabel: str) -> None:
    pass
