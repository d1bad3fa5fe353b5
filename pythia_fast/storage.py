"""What checkpoints stand on: directories published whole, and DCP's files written and read safely.

torch.distributed.checkpoint (DCP) leaves three gaps that are closed here: it syncs a file before
its last bytes are written, it has no checksums, and it unpickles its `.metadata` without limits.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo

from pythia_fast.errors import CheckError, Ending
from pythia_fast.parallel.mesh import together
from pythia_fast.pieces import LoadPlanner, Pieces, SavePlanner

METADATA = ".metadata"
_BYTES_PER_FILE = 1 << 30  # a file, and a thread that writes it, for each GiB of tensors
_MAX_FILES = 8

# --- directories and files that survive a power loss ----------------------------------------------


@contextmanager
def publish_directory(final: Path) -> Iterator[Path]:
    """Yields an empty directory beside `final` that becomes `final` at the end, or disappears.

    The files in it must be synced to disk by whoever writes them. Raises OSError.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        make_directories(final.parent)
        remove_tree(temporary)
        temporary.mkdir()
        yield temporary
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(final.parent)
    except BaseException:
        remove_tree(temporary)
        raise


def _write_all(fd: int | None, view: memoryview) -> None:
    assert fd is not None
    while view:
        view = view[os.write(fd, view) :]


def write_synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_all(fd, memoryview(data))
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """mkdir -p whose new entries survive a power loss."""
    if not path.is_dir():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


# --- writing DCP files ----------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Pieces], group: ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Writes the torch.distributed.checkpoint files; returns name -> {bytes, sha256}.

    group: the CPU group of the processes that write one checkpoint together; None: this one alone.
    All return all files. Raises OSError on all where one cannot write.
    """
    size = sum(t.nbytes for t in tensors.values())
    # copies ahead are made on a stream: not for what is on the host, beside a step on the GPU
    ahead = 10_000_000 if any(t.is_cuda for t in tensors.values()) else 0
    writer = dcp.FileSystemWriter(
        path,
        sync_files=False,
        thread_count=min(1 + size // _BYTES_PER_FILE, _MAX_FILES),
        per_thread_copy_ahead=ahead,
    )
    writer.fs = disk = _SyncedFiles()
    writer.storage_meta = lambda: None  # type: ignore[method-assign]  # paths and ids of this host
    with _plain_errors():
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=SavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )

    def mine() -> dict[str, dict[str, Any]]:
        disk.raise_failure()
        return disk.written

    written = {name: entry for files in together(group, mine) for name, entry in files.items()}
    # DCP hides what its threads raise: is every tensor there?
    together(group, lambda: read_metadata(path, written) and None)
    return written


class _SyncedFiles(FileSystem):
    """DCP's file system with sha256 while writing and fsync at every close.

    DCP drops what its writer threads raise, and torch.save replaces it, so the first error is kept
    here, later writes are dropped, and `raise_failure` raises it.
    """

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}
        self.failure: BaseException | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        stream = _HashedFile(self, Path(path))
        try:
            yield stream
        finally:
            stream.close()

    def attempt(self, call: Callable[[], Any], always: bool = False) -> Any:
        if self.failure is None or always:
            try:
                return call()
            except BaseException as error:
                self.failure = self.failure or error
        return None

    def mkdir(self, path: str | os.PathLike) -> None:
        """The directory is there: `publish_directory` made it."""

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        self.attempt(lambda: Path(path).rename(new_path))
        if self.failure is None:
            self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


class _HashedFile:
    """The part of a binary file that DCP, torch.save and pickle use."""

    def __init__(self, disk: _SyncedFiles, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._disk, self._path = disk, path
        self._fd: int | None = disk.attempt(lambda: os.open(path, flags, 0o666))
        self._bytes, self._hash = 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        if self._disk.failure is None:
            self._disk.attempt(lambda: _write_all(self._fd, view))
            self._hash.update(view)
        return len(view)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is None:
            return
        self._disk.attempt(lambda: os.fsync(fd))
        self._disk.attempt(lambda: os.close(fd), always=True)
        self._disk.written[self._path.name] = {
            "bytes": self._bytes,
            "sha256": self._hash.hexdigest(),
        }


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP's CheckpointException (a BaseException) as the error that caused it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank = min(error.failures)
            cause, _ = error.failures[rank]
            if rank > 0 and not isinstance(cause, Ending | OSError):
                raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from None
            raise cause from None


# --- reading DCP files ----------------------------------------------------------------------------


def kind(entry: Any) -> tuple[torch.Size, torch.dtype]:
    return entry.size, entry.properties.dtype


def read_tensors(path: Path, metadata: dcp.Metadata, into: Mapping[str, Tensor | Pieces]) -> None:
    planner = LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _plain_errors():
            reader = _Reader(path, metadata)
            dcp.load(dict(into), storage_reader=reader, planner=planner, no_dist=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error


class _Reader(dcp.FileSystemReader):
    """DCP's reader on metadata that was unpickled under the allow-list; shards hold no code."""

    def __init__(self, path: Path, metadata: dcp.Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        return self._metadata


def read_metadata(path: Path, files: dict[str, Any]) -> dcp.Metadata:
    """`.metadata`, a pickle, read under an allow-list; its claims checked against the files."""
    if METADATA not in files:
        raise CheckError(f"{path}: {METADATA} is not in the manifest")
    try:
        with (path / METADATA).open("rb") as f:
            metadata = _MetadataUnpickler(f).load()
        _check_metadata(metadata, files)
    except Exception as error:  # whatever a forged pickle provokes
        reason = str(error).partition("\n")[0]
        raise CheckError(f"{path / METADATA} is refused: {reason}") from error
    return metadata


_RECORDS = (
    dcp_metadata.ChunkStorageMetadata,
    dcp_metadata.Metadata,
    dcp_metadata.MetadataIndex,
    dcp_metadata.TensorProperties,
    dcp_metadata.TensorStorageMetadata,
    _StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(c.__module__, c.__name__): c for c in (*_RECORDS, dcp_metadata._MEM_FORMAT_ENCODING)},
    ("torch", "Size"): torch.Size,
    # a look-up of "torch.strided" in a fixed table
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        ("torch", str(d).removeprefix("torch.")): d
        for d in (getattr(torch, name) for name in dir(torch))
        if isinstance(d, torch.dtype)
    },
}


class _MetadataUnpickler(pickle._Unpickler):  # the one in Python: its opcodes can be replaced
    """Builds nothing but the classes of `_ALLOWED`, and never changes a class."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return _ALLOWED[module, name]

    def _build(self: Any) -> None:
        """BUILD sets attributes: of a record made here, never of what the program shares."""
        if type(self.stack[-2]) not in _RECORDS:
            raise pickle.UnpicklingError(f"it sets attributes of {self.stack[-2]!r}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)

    dispatch[pickle.BUILD[0]] = _build


def _check_metadata(metadata: Any, files: dict[str, Any]) -> None:
    """Raises ValueError unless each tensor is covered by chunks that lie in files of the manifest.

    Without it a forged table could read outside of the directory, leave memory uninitialised, or
    allocate what no file holds.
    """
    if type(metadata) is not dcp.Metadata:
        raise ValueError("it is not the metadata of a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is not dcp_metadata.TensorStorageMetadata:
            raise ValueError(f"{name} is not a tensor")
        shape, dtype = kind(entry)
        if type(shape) is not torch.Size or type(dtype) is not torch.dtype:
            raise ValueError(f"{name} has no shape or no dtype")
        stored = 0
        _check_disjoint(name, shape, entry.chunks)
        for chunk in entry.chunks:
            info = metadata.storage_data[dcp_metadata.MetadataIndex(name, chunk.offsets)]
            elements = math.prod(chunk.sizes)
            if info.relative_path not in files or info.transform_descriptors:
                raise ValueError(f"{name} lies in {info.relative_path!r}")
            end = info.offset + info.length
            if info.offset < 0 or end > files[info.relative_path]["bytes"]:
                raise ValueError(f"{name} lies beyond the end of {info.relative_path}")
            if elements * dtype.itemsize > info.length:
                raise ValueError(f"{name} claims more than its {info.length} bytes")
            stored += elements
        if stored != math.prod(shape):
            raise ValueError(f"{name} is stored in part: {stored} of {math.prod(shape)} elements")


def _check_disjoint(name: str, shape: torch.Size, chunks: Sequence[Any]) -> None:
    """Each chunk a box within the tensor, no two of them sharing an element."""
    boxes = [(tuple(c.offsets), tuple(c.sizes)) for c in chunks]
    for offsets, sizes in boxes:
        inside = zip(offsets, sizes, shape, strict=True)
        if not all(o >= 0 and n >= 0 and o + n <= whole for o, n, whole in inside):
            raise ValueError(f"{name} has a chunk outside of its shape {list(shape)}")
    before: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for a, size_a in sorted(boxes):
        if a:  # a sweep along the first dim: what ends before this box begins cannot overlap
            before = [(b, size_b) for b, size_b in before if b[0] + size_b[0] > a[0]]
        for b, size_b in before:
            pairs = zip(a, size_a, b, size_b, strict=True)
            if all(x < y + m and y < x + n for x, n, y, m in pairs):
                raise ValueError(f"{name} has two chunks that overlap")
        before.append((a, size_a))
