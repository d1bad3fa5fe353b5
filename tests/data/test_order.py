"""The orders against the original algorithm walked by hand, and against the flat statement."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from corpus import make_documents, neox_order, neox_rows, write_pair, write_shards
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_proof import REPOSITORY, Mutant, assert_killed

from pythia_fast.data import order
from pythia_fast.data.order import open_rows
from pythia_fast.errors import InputError

# sizes, seq_len, steps, batch_size, seed; what each is there for
NEOX_CASES = {
    "one epoch": ([9, 30, 1, 0, 12, 55, 8, 20], 8, 4, 4, 1234),
    "several epochs": ([9, 30, 1, 0, 12, 55, 8, 20], 8, 20, 4, 7),
    "empty documents": ([0, 0, 0, 0, 5, 0, 0, 4, 0], 4, 3, 5, 0),
    "the factor decides the epochs": ([33, 48], 8, 5, 2, 1),  # 10 rows in one epoch, 11 wanted
    "the last token decides": ([40, 48], 8, 2, 5, 1),  # 88 tokens: 10 samples and not 11
    "documents longer than rows": ([200, 1, 300], 8, 5, 10, 1234),
}


def _check_neox(module: ModuleType, directory: Path) -> None:
    for case, (sizes, seq_len, steps, batch, seed) in NEOX_CASES.items():
        documents = make_documents(sizes, seed=len(case))
        prefix = write_pair(directory / "document", documents)
        rows = module.open_rows(
            prefix, order="gpt-neox", seq_len=seq_len, seed=seed, steps=steps, batch_size=batch
        )
        doc_idx, sample_idx, shuffle_idx = neox_order(sizes, seq_len, seed, steps * batch)
        assert np.array_equal(rows.doc_idx, doc_idx), case
        assert rows.sample_idx.tolist() == [list(begin) for begin in sample_idx], case
        assert np.array_equal(rows.shuffle_idx, shuffle_idx), case
        expected = neox_rows(documents, seq_len, seed, steps * batch)
        assert np.array_equal(rows.tokens(0, len(rows)), expected), case
        assert rows.tokens(0, 1).dtype == np.dtype("<u2"), case


def test_neox_cases(tmp_path: Path) -> None:
    _check_neox(order, tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    seq_len=st.integers(1, 20),
    rows=st.integers(1, 120),
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 9),
)
@example(sizes=[1], seq_len=1, rows=1, seed=0, block=1)
def test_neox_is_the_original_walk(
    tmp_path_factory: pytest.TempPathFactory, sizes, seq_len, rows, seed, block
) -> None:
    directory = tmp_path_factory.mktemp("order")
    documents = make_documents(sizes)
    prefix = write_pair(directory / "document", documents)
    with pytest.MonkeyPatch.context() as patch:  # many blocks also in small cases
        patch.setattr(order, "DOCUMENTS_A_BLOCK", block)
        patch.setattr(order, "ROWS_A_BLOCK", block)
        found = open_rows(
            prefix, order="gpt-neox", seq_len=seq_len, seed=seed, steps=rows, batch_size=1
        )
        doc_idx, sample_idx, shuffle_idx = neox_order(sizes, seq_len, seed, rows)
        assert np.array_equal(found.doc_idx, doc_idx)
        assert found.sample_idx.tolist() == [list(begin) for begin in sample_idx]
        assert np.array_equal(found.shuffle_idx, shuffle_idx)
        expected = neox_rows(documents, seq_len, seed, rows)
        assert np.array_equal(found.tokens(0, len(found)), expected)
        assert np.array_equal(found.tokens(rows // 2, rows), expected[rows // 2 : rows])


def test_neox_over_shards(tmp_path: Path) -> None:
    documents = make_documents([50, 3, 80, 0, 31])
    write_pair(tmp_path / "document", documents)
    data = (tmp_path / "document.bin").read_bytes()
    (tmp_path / "document.bin").unlink()
    write_shards(tmp_path / "document", data, cuts=[64, 66, 200])
    rows = open_rows(tmp_path / "document", order="gpt-neox", seq_len=16, steps=3, batch_size=5)
    assert np.array_equal(rows.tokens(0, len(rows)), neox_rows(documents, 16, 1234, 15))


def test_the_published_run_wants_147164160_samples() -> None:
    """Of pythia's index file names; T of the deduplicated Pile gives two epochs, 202,314,857."""
    wanted = order.math.ceil(143_000 * 1024 * order.OVERSAMPLING)
    assert wanted == 147_164_160
    assert order.epochs_and_samples(207_170_414_058, 2048, wanted) == (2, 202_314_857)
    assert order.epochs_and_samples(334_000_000_000, 2048, wanted)[0] == 1


# sha256 of rows 0..63 as little-endian uint16 of the corpus below: no later numpy may change it
GOLDEN = "a360e391f77e10daa1fc95ab4a03d6ffd0b5c6351e430cea2eab1c06a6cd5a1c"


def test_golden_order(tmp_path: Path) -> None:
    sizes = [(n * n) % 97 for n in range(200)]
    flat = (np.arange(sum(sizes)) * 31) % 50_000
    prefix = write_pair(tmp_path / "document", np.split(flat, np.cumsum(sizes)[:-1]))
    rows = open_rows(prefix, order="gpt-neox", seq_len=32, steps=100, batch_size=8)
    assert hashlib.sha256(rows.tokens(0, 64).astype("<u2").tobytes()).hexdigest() == GOLDEN


def _check_strided(module: ModuleType, directory: Path) -> None:
    flat = make_documents([17 * 12])[0]
    data = flat.astype("<u2").tobytes()
    # a row of 17 tokens straddles each of these cuts; one shard is shorter than a row
    write_shards(directory / "cut", data, cuts=[50, 60, 34 * 5 + 2])
    (directory / "whole.bin").write_bytes(data)
    write_pair(directory / "indexed", np.split(flat, 12))
    expected = flat.reshape(12, 17)
    for name in ("cut", "whole", "indexed"):
        rows = module.open_rows(
            directory / name, order="preshuffled", seq_len=16, steps=6, batch_size=2
        )
        assert len(rows) == 12 and rows.tokens(0, 1).dtype == np.dtype("<u2")
        for start in range(12):
            for stop in range(start, 13):
                assert np.array_equal(rows.tokens(start, stop), expected[start:stop])
    rows = module.open_rows(
        directory / "indexed", order="sequential", seq_len=16, steps=6, batch_size=2
    )
    assert len(rows) == 12  # (204 − 1) // 16
    expected = np.stack([flat[16 * j : 16 * j + 17] for j in range(12)])
    assert np.array_equal(rows.tokens(0, 12), expected)
    assert np.array_equal(rows.tokens(5, 9), expected[5:9])


def test_preshuffled_and_sequential(tmp_path: Path) -> None:
    _check_strided(order, tmp_path)


def test_fingerprint_is_of_data_and_order(tmp_path: Path) -> None:
    documents = make_documents([100, 17, 53])
    write_pair(tmp_path / "document", documents)
    base = {"order": "gpt-neox", "seq_len": 16, "seed": 1, "steps": 2, "batch_size": 3}

    def fingerprint(**changed) -> str:
        return open_rows(tmp_path / "document", **(base | changed)).fingerprint

    same = fingerprint()
    assert same == fingerprint(steps=1)  # as many epochs: the same order
    others = [
        fingerprint(seed=2),
        fingerprint(seq_len=8),
        fingerprint(steps=4),  # two epochs
        fingerprint(order="sequential"),
        fingerprint(order="preshuffled"),
    ]
    write_pair(tmp_path / "document", [documents[1], documents[0], documents[2]])
    others.append(fingerprint())
    assert len({same, *others}) == 7
    data = (tmp_path / "document.bin").read_bytes()
    write_shards(tmp_path / "cut", data, cuts=[100])
    cut = open_rows(tmp_path / "cut", order="preshuffled", seq_len=16, steps=1, batch_size=1)
    assert cut.fingerprint == fingerprint(order="preshuffled")  # however it is stored


@pytest.mark.parametrize("kind", ["sequential", "preshuffled"])
def test_too_few_rows_names_both_numbers(tmp_path: Path, kind: str) -> None:
    write_pair(tmp_path / "document", make_documents([170]))
    with pytest.raises(InputError, match=r"10 rows of 17 .* needs 12 \(steps 3 × batch size 4\)"):
        open_rows(tmp_path / "document", order=kind, seq_len=16, steps=3, batch_size=4)


def test_bad_data_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "document"
    run = {"seq_len": 16, "steps": 1, "batch_size": 1}
    write_pair(prefix, make_documents([171]))
    with pytest.raises(InputError, match="171 tokens are not whole rows of 17"):
        open_rows(prefix, order="preshuffled", **run)
    with pytest.raises(InputError, match="'neox' is none of gpt-neox, preshuffled, sequential"):
        open_rows(prefix, order="neox", **run)
    write_pair(prefix, make_documents([170]), "f4")
    for kind in order.ORDERS:
        with pytest.raises(InputError, match="dtype float32 holds no token ids"):
            open_rows(prefix, order=kind, **run)
    write_pair(prefix, make_documents([0, 0]))
    with pytest.raises(InputError, match="0 tokens"):
        open_rows(prefix, order="gpt-neox", **run)
    (tmp_path / "odd.bin").write_bytes(bytes(35))
    with pytest.raises(InputError, match="35 bytes are not a multiple of the token size 2"):
        open_rows(tmp_path / "odd", order="preshuffled", **run)


def test_rows_beyond_the_end_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "document", make_documents([170]))
    for kind in order.ORDERS:
        rows = open_rows(tmp_path / "document", order=kind, seq_len=16, steps=1, batch_size=1)
        for start, stop in ((0, len(rows) + 1), (-1, 1), (3, 2)):
            with pytest.raises(InputError, match="are not within the"):
                rows.tokens(start, stop)


def _check_cache(module: ModuleType, directory: Path) -> None:
    """Every run finds its own order although all index files share one directory."""
    documents = make_documents([100, 17, 53])
    cache = directory / "cache"
    for other in (False, True):
        documents = documents[::-1] if other else documents
        prefix = write_pair(directory / "document", documents)
        for seq_len, seed, rows in ((16, 1, 10), (16, 2, 10), (8, 1, 10), (16, 1, 30)):
            found = module.open_rows(
                prefix,
                order="gpt-neox",
                seq_len=seq_len,
                seed=seed,
                steps=rows,
                batch_size=1,
                cache=cache,
            )
            expected = neox_rows(documents, seq_len, seed, rows)
            assert np.array_equal(found.tokens(0, len(found)), expected)
    assert not list(directory.glob("*.npy")) and len(list(cache.glob("*.npy"))) == 3 * 8


def test_cache_names_pin_every_input(tmp_path: Path) -> None:
    _check_cache(order, tmp_path)


def test_cache_is_used_and_damage_is_named(tmp_path: Path, monkeypatch) -> None:
    prefix = write_pair(tmp_path / "document", make_documents([170]))
    run = {"order": "gpt-neox", "seq_len": 16, "steps": 1, "batch_size": 1}
    first = open_rows(prefix, **run).tokens(0, 10)
    monkeypatch.setattr(order, "build_index", None)
    assert np.array_equal(open_rows(prefix, **run).tokens(0, 10), first)
    path = next(tmp_path.glob("*_shuffle_idx.npy"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shuffle_idx\.npy: damaged"):
        open_rows(prefix, **run)
    for damaged in (np.arange(9, dtype=np.uint32), np.arange(10, dtype=np.int32)):
        np.save(path, damaged)
        with pytest.raises(InputError, match=r"int32 \(\d+,\), expected uint32 \(10,\)"):
            open_rows(prefix, **run)


def test_read_only_directory_names_the_way_out(tmp_path: Path, monkeypatch) -> None:
    prefix = write_pair(tmp_path / "document", make_documents([170]))
    run = {"order": "gpt-neox", "seq_len": 16, "steps": 1, "batch_size": 1}

    def refuse(*arguments) -> None:
        raise PermissionError(13, "Permission denied")

    # root may write anywhere, so the refusal is made here
    with monkeypatch.context() as patch:
        patch.setattr(order, "locked", refuse)
        with pytest.raises(InputError, match=r"Permission denied.*data\.cache"):
            open_rows(prefix, **run)
    assert len(open_rows(prefix, cache=tmp_path / "elsewhere", **run)) == 10


BUILDER = """
import hashlib, json, os, sys, time
from pythia_fast.data import order
built = []
build = order.build_index
def counted(*arguments):
    built.append(1)
    if sys.argv[2] == "hang":
        with order.publish(arguments[-1]["doc"]):
            print("building", flush=True)
            time.sleep(60)
    time.sleep(0.3)
    build(*arguments)
order.build_index = counted
sys.stdin.read(1)  # all start together
rows = order.open_rows(sys.argv[1], order="gpt-neox", seq_len=16, steps=50, batch_size=4)
digest = hashlib.sha256(rows.tokens(0, len(rows)).tobytes()).hexdigest()
print(json.dumps({"built": len(built), "digest": digest}))
"""


def _builder(prefix: Path, mode: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(prefix), mode],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_four_processes_build_one_index(tmp_path: Path) -> None:
    documents = make_documents([100, 17, 53] * 20)
    prefix = write_pair(tmp_path / "document", documents)
    builders = [_builder(prefix, "build") for _ in range(4)]
    for builder in builders:
        builder.stdin.write(b"x")
        builder.stdin.flush()
    results = [json.loads(builder.communicate()[0]) for builder in builders]
    assert sum(result["built"] for result in results) == 1
    expected = neox_rows(documents, 16, 1234, 200).astype("<u2").tobytes()
    assert {result["digest"] for result in results} == {hashlib.sha256(expected).hexdigest()}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_killed_builder_leaves_no_lock_and_no_litter(tmp_path: Path) -> None:
    documents = make_documents([100, 17, 53] * 20)
    prefix = write_pair(tmp_path / "document", documents)
    builder = _builder(prefix, "hang")
    builder.stdin.write(b"x")
    builder.stdin.flush()
    assert builder.stdout.readline() == b"building\n"
    builder.kill()
    builder.wait()
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    rows = open_rows(prefix, order="gpt-neox", seq_len=16, steps=50, batch_size=4)
    assert np.array_equal(rows.tokens(0, len(rows)), neox_rows(documents, 16, 1234, 200))
    assert not list(tmp_path.glob(".*.tmp"))


NEOX_MUTANTS = [
    ("a fresh RandomState", "random.shuffle(shuffle_idx)", "np.random.RandomState(seed).shuffle(shuffle_idx)"),
    ("another seed", "RandomState(seed)", "RandomState(1234)"),
    ("no document shuffle", "random.shuffle(doc_idx)", "pass"),
    (
        "epochs shuffled apart",
        "random.shuffle(doc_idx)",
        "[random.shuffle(part) for part in doc_idx.reshape(epochs, documents)]",
    ),
    ("no sample shuffle", "samples = self.shuffle_idx[first:last]", "samples = np.arange(first, last)"),
    ("stride L + 1", "dtype=np.int64) * seq_len", "dtype=np.int64) * (seq_len + 1)"),
    ("no oversampling", "OVERSAMPLING = 1.005", "OVERSAMPLING = 1.0"),
    ("one token too many", "(epochs * tokens - 1) // seq_len", "(epochs * tokens) // seq_len"),
    ("epochs by tokens", "wanted * seq_len + 1) // tokens", "wanted * seq_len) // tokens"),
    ("boundary to the left", 'side="right"', 'side="left"'),
    ("first begins late", "begins[0] = 0", "pass"),
    ("no last token", "length[tail] = last + 1", "length[tail] = last"),
    ("head not skipped", "origin[head] += skip", "pass"),
    ("offset of the block lost", "at + first", "at"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), NEOX_MUTANTS)
def test_neox_mutants(tmp_path: Path, name: str, old: str, new: str) -> None:
    def check(module: ModuleType) -> None:
        module.DOCUMENTS_A_BLOCK = 3
        _check_neox(module, tmp_path)

    assert_killed(Mutant(name, "pythia_fast/data/order.py", old, new), check, tmp_path)


STRIDED_MUTANTS = [
    ("sequential steps by L + 1", "StridedRows(dataset.tokens, seq_len, count", "StridedRows(dataset.tokens, seq_len + 1, count"),
    ("preshuffled steps by L", "StridedRows(stream, width, total", "StridedRows(stream, seq_len, total"),
    ("one row fewer", "max(0, (total - 1) // seq_len)", "max(0, (total - 2) // (seq_len + 1))"),
    ("without an index int16", 'TokenStream(bin_paths(prefix), np.dtype("<u2"))', 'TokenStream(bin_paths(prefix), np.dtype("<i2"))'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), STRIDED_MUTANTS)
def test_strided_mutants(tmp_path: Path, name: str, old: str, new: str) -> None:
    mutant = Mutant(name, "pythia_fast/data/order.py", old, new)
    assert_killed(mutant, lambda module: _check_strided(module, tmp_path), tmp_path)


@pytest.mark.parametrize("part", ["{samples}ns", "{seq_len}sl", "{seed}s", "{dataset.digest[:16]}"])
def test_cache_mutants(tmp_path: Path, part: str) -> None:
    mutant = Mutant(part, "pythia_fast/data/order.py", part, "")
    assert_killed(mutant, lambda module: _check_cache(module, tmp_path), tmp_path)
