"""The .bin/.idx reader and writer against the format written out byte by byte, and damage."""

from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from corpus import IDX_CODES, idx_bytes, make_documents, write_pair, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed

from pythia_fast.data import indexed
from pythia_fast.data.indexed import IndexedDataset, IndexedWriter, bin_paths
from pythia_fast.errors import InputError

SIZES = [3, 0, 5, 1, 0, 7]


@pytest.mark.parametrize("dtype", IDX_CODES)
def test_writes_the_bytes_of_the_format(tmp_path: Path, dtype: str) -> None:
    documents = make_documents(SIZES, vocabulary=100)
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        writer.add(documents[0])
        writer.add_many(np.concatenate(documents[1:]), SIZES[1:])
    write_pair(tmp_path / "theirs", documents, dtype)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", IDX_CODES)
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_reads_every_dtype(tmp_path: Path, dtype: str, suffix: str) -> None:
    documents = make_documents(SIZES, vocabulary=100)
    write_pair(tmp_path / "pile_0.87_document", documents, dtype)
    dataset = IndexedDataset(str(tmp_path / "pile_0.87_document") + suffix)
    assert len(dataset) == len(SIZES) and dataset.dtype == np.dtype("<" + dtype)
    for n, document in enumerate(documents):
        assert np.array_equal(dataset[n], document)
    assert dataset.document_index.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_maps_and_does_not_copy(tmp_path: Path) -> None:
    write_pair(tmp_path / "document", make_documents([500_000, 500_000]))
    tracemalloc.start()
    dataset = IndexedDataset(tmp_path / "document")
    row = dataset[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000 and len(row) == 500_000  # the .bin has 2,000,000 bytes
    assert not row.flags.owndata and not row.flags.writeable


def test_shards_are_one_stream(tmp_path: Path) -> None:
    documents = make_documents([40, 3, 60, 9])
    write_pair(tmp_path / "document", documents)
    data = (tmp_path / "document.bin").read_bytes()
    (tmp_path / "document.bin").unlink()
    write_shards(tmp_path / "document", data, cuts=[2, 30, 30, 200])
    dataset = IndexedDataset(tmp_path / "document")
    for n, document in enumerate(documents):
        assert np.array_equal(dataset[n], document)
    flat, index = np.concatenate(documents), np.arange(112).reshape(2, 56)[:, ::-1]
    assert np.array_equal(dataset.tokens.take(index), flat[index])


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "document", "u2") as writer:
        writer.add([1, 2, 3])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write_pair(tmp_path / "document", make_documents([4]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(InputError, match="does not fit"),
        IndexedWriter(tmp_path / "document", "u2") as writer,
    ):
        writer.add([65536])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_empty_dataset(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "document", "u2"):
        pass
    dataset = IndexedDataset(tmp_path / "document")
    assert len(dataset) == 0 and len(dataset.tokens) == 0


def _with_pointer(sizes: list[int], document: int, pointer: int) -> bytes:
    data = idx_bytes(sizes)
    at = 34 + 4 * len(sizes) + 8 * document
    return data[:at] + struct.pack("<q", pointer) + data[at + 8 :]


FAULTS = {
    "empty file": (b"", "0 bytes, a header alone has 34"),
    "magic": (b"X" + idx_bytes(SIZES)[1:], "not a Megatron index"),
    "version": (idx_bytes(SIZES, version=2), "version 2, only 1"),
    "dtype": (idx_bytes(SIZES, code=9), "dtype code 9, known are 1 to 8"),
    "counts": (idx_bytes(SIZES, sequences=2**60), f"162 bytes, .* needs {34 + 12 * 2**60 + 56}"),
    "documents": (idx_bytes(SIZES, documents=2**63), "162 bytes, .* needs"),
    "truncated": (idx_bytes(SIZES)[:-1], "161 bytes, .* needs 162"),
    "negative size": (idx_bytes([3, -1, 6, 1, 0, 7]), "document 1 of size -1"),
    "item size": (idx_bytes(SIZES, code=4), "document 1 .* byte 6, .* byte 12"),
    "pointer": (_with_pointer(SIZES, 3, 18), "document 3 of size 1 points to byte 18, .* byte 16"),
    "fewer tokens": (idx_bytes([3, 0, 5, 1]), "longer than its index: 32 bytes, .* needs 18"),
    "more tokens": (idx_bytes([3, 0, 5, 1, 0, 8]), "truncated: 32 bytes, .* needs 34"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_the_file_and_the_numbers(tmp_path: Path, fault: str) -> None:
    data, message = FAULTS[fault]
    write_pair(tmp_path / "document", make_documents(SIZES))
    (tmp_path / "document.idx").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as error:
        IndexedDataset(tmp_path / "document")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert str(tmp_path / "document") in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"document\.idx: no such file"):
        IndexedDataset(tmp_path / "document")
    (tmp_path / "document.idx").write_bytes(idx_bytes(SIZES))
    with pytest.raises(InputError, match=r"document\.bin: no such file"):
        IndexedDataset(tmp_path / "document")
    shards = write_shards(tmp_path / "document", bytes(32), cuts=[10, 20])
    assert bin_paths(tmp_path / "document") == shards
    shards[1].unlink()
    with pytest.raises(InputError, match=r"document-00001-of-00002\.bin: this shard is missing"):
        IndexedDataset(tmp_path / "document")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Flipped bytes, truncations and insertions: the same documents or InputError, nothing else."""
    directory = tmp_path_factory.mktemp("fuzz")
    documents = make_documents(SIZES)
    write_pair(directory / "document", documents)
    index = bytearray((directory / "document.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        at = data.draw(st.integers(0, max(0, len(index) - 1)))
        if kind == "flip" and index:
            index[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del index[at:]
        else:
            index[at:at] = data.draw(st.binary(max_size=20))
    (directory / "document.idx").write_bytes(index)
    try:
        dataset = IndexedDataset(directory / "document")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert [dataset[n].tolist() for n in range(len(dataset))] == [d.tolist() for d in documents]


def _refuses_damage(module: ModuleType, directory: Path) -> None:
    for fault in FAULTS:
        write_pair(directory / "document", make_documents(SIZES))
        (directory / "document.idx").write_bytes(FAULTS[fault][0])
        try:
            module.IndexedDataset(directory / "document")
        except InputError:
            continue
        raise AssertionError(f"{fault}: opened")


MUTANTS = [
    ("no magic", "if magic != MAGIC:", "if False:"),
    ("no version", "if version != 1:", "if False:"),
    ("no count check", "if needed != present:\n        raise", "if False:\n        raise"),
    (
        "no .bin size check",
        "if needed != present:\n            what",
        "if False:\n            what",
    ),
    ("no pointer check", "(sizes < 0) | (pointers != expected)", "sizes < 0"),
    ("no size check", "(sizes < 0) | (pointers != expected)", "pointers != expected"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS)
def test_mutants(tmp_path: Path, name: str, old: str, new: str) -> None:
    _refuses_damage(indexed, tmp_path)
    mutant = Mutant(name, "pythia_fast/data/indexed.py", old, new)
    assert_killed(mutant, lambda module: _refuses_damage(module, tmp_path), tmp_path)


@pytest.mark.parametrize("prefix", ["", "/", ".", "//"])
def test_a_prefix_without_a_name_is_refused(prefix: str) -> None:
    for opened in (IndexedDataset, indexed.split_prefix):
        with pytest.raises(InputError, match=re.escape(f"'{prefix}': name the token files")):
            opened(prefix)
