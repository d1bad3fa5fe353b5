"""The loader: batches, digests, read-ahead, errors and the end of its thread."""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from kernel_proof import Mutant, assert_killed

from pythia_fast.data import loader
from pythia_fast.data.loader import RUNNING_START, Loader, batch_digest, running_digest
from pythia_fast.errors import InputError


@dataclass
class FakeRows:
    """Row j holds 3j, 3j + 1, 3j + 2; records what was asked for, fails at row `broken`."""

    broken: int = -1
    dtype: str = "<u2"
    seq_len: int = 2
    fingerprint: str = ""
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return 10_000

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self.asked.append(start)
        if start <= self.broken < stop:
            raise OSError(f"row {self.broken} cannot be read")
        return np.arange(3 * start, 3 * stop, dtype=self.dtype).reshape(-1, 3)


def packed_digest(ids: list[int]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<I", id) for id in ids)).hexdigest()


def test_batches_of_a_range_of_steps() -> None:
    with Loader(FakeRows(), 4, 5, 9, vocab_size=500) as batches:
        found = list(batches)
    assert [batch.step for batch in found] == [5, 6, 7, 8]
    for batch in found:
        assert (batch.first_row, batch.last_row) == (4 * batch.step, 4 * batch.step + 3)
        ids = list(range(12 * batch.step, 12 * batch.step + 12))
        assert batch.tokens.shape == (4, 3) and batch.tokens.ravel().tolist() == ids
        assert batch.digest == packed_digest(ids)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i4", ">i4", "<i8"])
def test_digest_is_of_ids_not_of_storage(dtype: str) -> None:
    ids = np.arange(6, dtype=dtype).reshape(2, 3)
    assert batch_digest(ids) == packed_digest([0, 1, 2, 3, 4, 5])
    assert batch_digest(ids.T) == packed_digest([0, 3, 1, 4, 2, 5])
    assert batch_digest(np.asfortranarray(ids)) == batch_digest(ids)


def test_running_digest() -> None:
    first, second = packed_digest([1]), packed_digest([2])
    after = hashlib.sha256(b"0" * 64 + first.encode()).hexdigest()
    assert running_digest(RUNNING_START, first) == after
    expected = hashlib.sha256((after + second).encode()).hexdigest()
    assert running_digest(after, second) == expected


def test_an_id_outside_the_vocabulary_is_placed() -> None:
    with Loader(FakeRows(), 4, 0, 9, vocab_size=32) as batches:
        found = iter(batches)
        assert [next(found).step, next(found).step] == [0, 1]
        message = "step 2, row 10, position 2: token id 32 is outside the vocabulary of 32"
        with pytest.raises(InputError, match=f"^{message}$"):
            next(found)


def test_a_negative_id_is_outside_the_vocabulary() -> None:
    rows = FakeRows(dtype="<i4")
    rows.tokens = lambda start, stop: np.array([[5, 1, -7]], "<i4")  # type: ignore[method-assign]
    with Loader(rows, 1, 0, 1, 10) as batches, pytest.raises(InputError, match=r"position 2.*-7"):
        next(iter(batches))


def test_an_error_of_the_thread_surfaces_at_its_step() -> None:
    with Loader(FakeRows(broken=13), 4, 0, 9, vocab_size=500) as batches:
        found = iter(batches)
        assert [next(found).step for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="row 13 cannot be read"):
            next(found)


def test_reads_ahead_within_its_depth_and_then_sleeps() -> None:
    rows = FakeRows()
    with Loader(rows, 4, 0, 1000, vocab_size=30_000, depth=3) as batches:
        found = iter(batches)
        next(found)
        deadline = time.monotonic() + 5
        while len(rows.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        spent = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - spent < 0.1  # seconds of CPU while nobody asks
        assert rows.asked == [0, 4, 8, 12]  # the batch taken, and three ahead
    assert len(rows.asked) == 4


def test_close_ends_the_thread() -> None:
    before = set(threading.enumerate())
    batches = Loader(FakeRows(), 4, 0, 1000, vocab_size=30_000)
    next(iter(batches))
    assert set(threading.enumerate()) - before
    batches.close()
    assert set(threading.enumerate()) == before
    batches.close()


def _check(module: ModuleType) -> None:
    batch = module.read_batch(FakeRows(), 2, 4, 500)
    assert (batch.first_row, batch.last_row) == (8, 11)
    assert batch.digest == packed_digest(list(range(24, 36)))
    assert module.batch_digest(np.array([[1, 2]], ">i8")) == packed_digest([1, 2])
    assert module.running_digest("0" * 64, "a") == hashlib.sha256(b"0" * 64 + b"a").hexdigest()
    for vocabulary in (35, 30):
        try:
            module.read_batch(FakeRows(), 2, 4, vocabulary)
        except InputError:
            continue
        raise AssertionError("an id outside the vocabulary passed")
    module.read_batch(FakeRows(), 2, 4, 36)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("uint16 digest", '"<u4"', '"<u2"'),
        ("big-endian digest", '"<u4"', '">u4"'),
        ("last row excluded", "last - 1, batch_digest", "last, batch_digest"),
        ("running reversed", "previous + digest)", "digest + previous)"),
        ("the last id passes", "tokens.max()) >= vocab_size", "tokens.max()) > vocab_size"),
        ("the next step", "batch_size * step, batch_size * (step + 1)", "step, step + batch_size"),
    ],
)
def test_mutants(tmp_path: Path, name: str, old: str, new: str) -> None:
    _check(loader)
    assert_killed(Mutant(name, "pythia_fast/data/loader.py", old, new), _check, tmp_path)
