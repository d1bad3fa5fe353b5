"""Megatron's ``.bin/.idx`` pair: documents of token ids back to back, memory-mapped.

``.idx``, little-endian (the fork that trained Pythia; facts: gpt-neox v1.0 indexed_dataset.py)::

    "MMIDIDX\\0\\0" (9 B) | u64 version = 1 | u8 dtype code | u64 S sequences | u64 D
    i32 sizes[S] (tokens) | i64 pointers[S] (bytes into .bin) | i64 document_index[D]

``.bin``: the tokens and nothing else, in one file or in shards ``NAME-000NN-of-000LL.bin``, where
LL is the last index. A sequence is a document; document_index is 0, then cumulative counts.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pythia_fast.data.files import publish, sha256_file
from pythia_fast.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
DTYPES = {
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), start=1)
}
CHUNK = 1 << 22  # sequences per block of a scan

Tokens = NDArray[Any]


def split_prefix(prefix: str | Path) -> Path:
    """``.../document`` of ``.../document``, ``.../document.bin`` or ``.../document.idx``."""
    path = Path(prefix)
    if not path.name:
        raise InputError(f"data.prefix = {str(prefix)!r}: name the token files, DIR/document")
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def beside(prefix: Path, suffix: str) -> Path:
    """prefix + suffix; unlike with_suffix it keeps dots in the name."""
    return prefix.with_name(prefix.name + suffix)


def bin_paths(prefix: Path) -> list[Path]:
    """``prefix.bin``, or its shards in order; InputError when one, or all, are missing."""
    whole = beside(prefix, ".bin")
    if whole.is_file():
        return [whole]
    pattern = re.compile(re.escape(prefix.name) + r"-(\d{5})-of-(\d{5})\.bin")
    directory = prefix.parent
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    shards = [match for name in names if (match := pattern.fullmatch(name))]
    if not shards:
        raise InputError(f"{whole}: no such file, and no shards {prefix.name}-000NN-of-000NN.bin")
    last = shards[0][2]
    for number in range(int(last) + 1):
        name = f"{prefix.name}-{number:05d}-of-{last}.bin"
        if number >= len(shards) or shards[number][0] != name:
            raise InputError(f"{directory / name}: this shard is missing ({len(shards)} at hand)")
    if len(shards) != int(last) + 1:
        raise InputError(f"{directory}: {len(shards)} shards of {prefix.name}, expected {last}+1")
    return [directory / shard[0] for shard in shards]


def map_array(path: Path, dtype: np.dtype[Any], count: int, offset: int = 0) -> Tokens:
    """`count` items from byte `offset` of a file, mapped read-only; the caller checked the size."""
    if count == 0:
        return np.empty(0, dtype)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(view, dtype, count, offset)


class TokenStream:
    """The virtual concatenation of one or more ``.bin`` files, each mapped, none joined."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.parts: list[Tokens] = []
        for path in paths:
            count, rest = divmod(path.stat().st_size, dtype.itemsize)
            if rest:
                raise InputError(
                    f"{path}: {path.stat().st_size} bytes are not a multiple of the token size"
                    f" {dtype.itemsize}"
                )
            self.parts.append(map_array(path, dtype, count))
        lengths = [len(part) for part in self.parts]
        self.starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))  # [parts + 1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop): a view when they lie in one file, else a copy."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            end = min(stop, int(self.starts[first + 1]))
            pieces.append(self.parts[first][start - self.starts[first] : end - self.starts[first]])
            start, first = end, first + 1
        if not pieces:
            return np.empty(0, self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def take(self, index: NDArray[np.int64]) -> Tokens:
        """The tokens at the given positions, in the shape of `index`."""
        if len(self.parts) == 1:
            return self.parts[0][index]
        part = np.searchsorted(self.starts, index, side="right") - 1
        out = np.empty(index.shape, self.dtype)
        for number in np.unique(part):
            here = part == number
            out[here] = self.parts[number][index[here] - self.starts[number]]
        return out


class IndexedDataset:
    """The documents of a ``.bin/.idx`` pair, mapped.

    Opening checks the header, the counts against the length of the ``.idx`` before anything is
    read by them, that every document begins where the one before it ends (all of them, streamed:
    2.5 GB for 210 million documents), and that the ``.bin`` has the bytes they need.

    sizes int32 [S] tokens; pointers int64 [S] bytes; document_index int64 [D]; tokens: the stream.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = split_prefix(prefix)
        self.path = path = beside(self.prefix, ".idx")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.dtype, count, documents = _read_header(path)
        sizes_at = HEADER.size
        pointers_at = sizes_at + 4 * count
        self.sizes = map_array(path, np.dtype("<i4"), count, sizes_at)
        self.pointers = map_array(path, np.dtype("<i8"), count, pointers_at)
        self.document_index = map_array(path, np.dtype("<i8"), documents, pointers_at + 8 * count)
        self.tokens = TokenStream(bin_paths(self.prefix), self.dtype)
        needed = self._check_layout(sizes_at, pointers_at)
        present = len(self.tokens) * self.dtype.itemsize
        if needed != present:
            what = "truncated" if present < needed else "longer than its index"
            where = beside(self.prefix, ".bin")
            raise InputError(f"{where}: {what}: {present} bytes, {path.name} needs {needed}")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> Tokens:
        """The token ids of one document, [sizes[document]]."""
        start = int(self.pointers[document]) // self.dtype.itemsize
        return self.tokens.slice(start, start + int(self.sizes[document]))

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the ``.idx``: dtype and every document's size and place."""
        return sha256_file(self.path)

    def _check_layout(self, sizes_at: int, pointers_at: int) -> int:
        """The bytes that the documents need, after a scan that holds one block in memory."""
        end = 0
        for first in range(0, len(self), CHUNK):
            count = min(CHUNK, len(self) - first)
            sizes = np.fromfile(self.path, "<i4", count, offset=sizes_at + 4 * first)
            pointers = np.fromfile(self.path, "<i8", count, offset=pointers_at + 8 * first)
            ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize + end
            expected = np.concatenate(([end], ends[:-1]))
            wrong = (sizes < 0) | (pointers != expected)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise InputError(
                    f"{self.path}: document {first + at} of size {sizes[at]} points to byte"
                    f" {pointers[at]}, expected a size >= 0 and byte {expected[at]}"
                )
            end = int(ends[-1])
        return end


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, number of sequences, length of the document index; each checked against the file."""
    present = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise InputError(f"{path}: {present} bytes, a header alone has {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise InputError(f"{path}: begins with {magic!r}, not {MAGIC!r}: not a Megatron index")
    if version != 1:
        raise InputError(f"{path}: version {version}, only 1 is known")
    if code not in DTYPES:
        raise InputError(f"{path}: dtype code {code}, known are 1 to {max(DTYPES)}")
    needed = HEADER.size + 12 * sequences + 8 * documents
    if needed != present:
        raise InputError(
            f"{path}: {present} bytes, its header ({sequences} sequences, {documents} document"
            f" marks) needs {needed}"
        )
    return DTYPES[code], sequences, documents


class IndexedWriter:
    """Writes a ``.bin/.idx`` pair that appears whole when the ``with`` block ends without error.

    The ``.idx`` is published last: without it there is no dataset.
    """

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        self.prefix = split_prefix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPES.values():
            raise InputError(f"{self.prefix}: the format has no dtype {self.dtype}")
        self._sizes: list[NDArray[np.int32]] = []
        self._publication = publish(beside(self.prefix, ".bin"))

    def __enter__(self) -> IndexedWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._publication.__enter__()
        return self

    def add(self, tokens: Any) -> None:
        """Appends one document, token ids [n]."""
        self.add_many(tokens, [len(tokens)])

    def add_many(self, tokens: Any, sizes: Any) -> None:
        """Appends documents that lie back to back in `tokens`; sizes [documents] sum to its length.

        Raises InputError when an id does not fit the dtype.
        """
        tokens, sizes = np.asarray(tokens), np.asarray(sizes, np.int32)
        if int(sizes.sum(dtype=np.int64)) != len(tokens):
            raise ValueError(f"sizes sum to {sizes.sum(dtype=np.int64)}, tokens are {len(tokens)}")
        stored = tokens.astype(self.dtype)
        if len(tokens) and not np.array_equal(stored, tokens):
            raise InputError(f"{self.prefix}: a token id does not fit dtype {self.dtype}")
        self._bin.write(stored.data)
        self._sizes.append(sizes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        index = beside(self.prefix, ".idx")
        if kind is None:
            index.unlink(missing_ok=True)  # an old index never stands beside a new .bin
        self._publication.__exit__(kind, error, trace)
        if kind is None:
            with publish(index) as file:
                sizes = np.concatenate([np.empty(0, np.int32), *self._sizes])
                write_index(file, self.dtype, sizes)


def write_index(file: BinaryIO, dtype: np.dtype[Any], sizes: NDArray[np.int32]) -> None:
    """The ``.idx`` of back-to-back documents of sizes [S] tokens, one sequence each."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    count = len(sizes)
    file.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
    file.write(np.ascontiguousarray(sizes, "<i4").data)
    end = 0
    for first in range(0, count, CHUNK):
        ends = np.cumsum(sizes[first : first + CHUNK], dtype="<i8") * dtype.itemsize + end
        file.write(np.concatenate(([end], ends[:-1])).astype("<i8").data)
        end = int(ends[-1])
    for first in range(0, count + 1, CHUNK):
        file.write(np.arange(first, min(first + CHUNK, count + 1), dtype="<i8").data)
