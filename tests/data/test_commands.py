"""What stands behind ``pythia-fast data``: view, digest, join, verify."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from corpus import make_documents, neox_rows, write_pair, write_shards
from kernel_proof import Mutant, assert_killed

from pythia_fast import progress
from pythia_fast.config import Config, Data, Model, Train
from pythia_fast.data import commands, files
from pythia_fast.data.commands import digest, join, rows_from, valid_rows_from, verify, view
from pythia_fast.data.loader import Loader
from pythia_fast.errors import CheckError, InputError

DOCUMENTS = make_documents([60, 3, 0, 200, 41, 96])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    prefix = write_pair(tmp_path / "document", DOCUMENTS)
    return Config(
        model=Model(vocab_size=30_000),
        data=Data(prefix=str(prefix), order="gpt-neox", seq_len=16),
        train=Train(steps=5, batch_size=4, micro_batch_size=2, seed=3),
    )


def test_view_shows_the_rows_of_the_order(config: Config) -> None:
    rows = neox_rows(DOCUMENTS, 16, 3, 20)
    found = list(view(config, 1, 4))
    assert [(row["step"], row["row"]) for row in found] == [(n // 4, n) for n in range(4, 16)]
    assert [row["tokens"] for row in found] == rows[4:16].tolist()
    json.dumps(found)


def test_digest_is_what_training_records(config: Config) -> None:
    rows = neox_rows(DOCUMENTS, 16, 3, 20)
    found = list(digest(config, 0, 5))
    running = "0" * 64
    with Loader(rows_from(config), 4, 0, 5, 30_000) as loader:
        for step, (entry, batch) in enumerate(zip(found, loader, strict=True)):
            here = hashlib.sha256(rows[4 * step : 4 * step + 4].astype("<u4").tobytes())
            running = hashlib.sha256((running + here.hexdigest()).encode()).hexdigest()
            assert entry == {
                "step": step,
                "first_row": 4 * step,
                "last_row": 4 * step + 3,
                "digest": here.hexdigest(),
                "running": running,
            }
            assert batch.digest == here.hexdigest()
    assert list(digest(config, 2, 5, running=found[1]["running"])) == found[2:]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("seed of the configuration", "seed=config.train.seed", "seed=1234"),
        ("order of the configuration", "order=config.data.order", 'order="sequential"'),
        ("no chain", "running = running_digest(running,", "_ = running_digest(running,"),
        ("steps shifted", "range(start, stop),", "range(start + 1, stop + 1),"),
    ],
)
def test_digest_mutants(tmp_path: Path, config: Config, name: str, old: str, new: str) -> None:
    rows = neox_rows(DOCUMENTS, 16, 3, 20)

    def check(module: ModuleType) -> None:
        running = "0" * 64
        for step, entry in enumerate(module.digest(config, 0, 4)):
            here = hashlib.sha256(rows[4 * step : 4 * step + 4].astype("<u4").tobytes())
            running = hashlib.sha256((running + here.hexdigest()).encode()).hexdigest()
            assert (entry["step"], entry["running"]) == (step, running)

    check(commands)
    assert_killed(Mutant(name, "pythia_fast/data/commands.py", old, new), check, tmp_path)


def test_steps_outside_the_run_are_refused(config: Config) -> None:
    for start, stop in ((0, 6), (-1, 2), (3, 3)):
        with pytest.raises(InputError, match=f"steps {start}:{stop} are not within the 5 steps"):
            next(view(config, start, stop))


def test_valid_rows(tmp_path: Path, config: Config) -> None:
    assert valid_rows_from(config) is None
    prefix = write_pair(tmp_path / "valid", make_documents([33, 20]))
    rows = valid_rows_from(Config(data=Data(valid_prefix=str(prefix), seq_len=16)))
    assert rows is not None and len(rows) == 3
    flat = np.concatenate(make_documents([33, 20]))
    assert np.array_equal(rows.tokens(1, 2)[0], flat[16:33])


def sharded(directory: Path) -> bytes:
    """directory/document.idx beside four shards; returns the joined bytes."""
    write_pair(directory / "document", DOCUMENTS)
    data = (directory / "document.bin").read_bytes()
    (directory / "document.bin").unlink()
    write_shards(directory / "document", data, cuts=[100, 300, 302])
    return data


def test_join_is_plain_concatenation(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    result = join(tmp_path / "document", tmp_path / "new" / "whole")
    whole = tmp_path / "new" / "whole"
    assert whole.with_suffix(".bin").read_bytes() == data
    assert whole.with_suffix(".idx").read_bytes() == (tmp_path / "document.idx").read_bytes()
    assert result == {
        "shards": 4,
        "bytes": len(data),
        "bin": str(whole.with_suffix(".bin")),
        "idx": str(whole.with_suffix(".idx")),
    }
    join(tmp_path / "document", tmp_path / "document")  # beside the shards, under their index
    assert (tmp_path / "document.bin").read_bytes() == data
    with pytest.raises(InputError, match="is the input itself"):
        join(tmp_path / "document", tmp_path / "document")


def test_join_without_an_index(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    (tmp_path / "document.idx").unlink()
    assert join(tmp_path / "document", tmp_path / "whole")["idx"] is None
    assert (tmp_path / "whole.bin").read_bytes() == data
    assert not (tmp_path / "whole.idx").exists()


def test_join_refuses_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    shard = tmp_path / "document-00003-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    message = f"truncated: {len(data) - 2} bytes, document.idx needs {len(data)}"
    with pytest.raises(InputError, match=message):
        join(tmp_path / "document", tmp_path / "whole")
    shard.unlink()
    with pytest.raises(InputError, match=r"document-00003-of-00003\.bin: this shard is missing"):
        join(tmp_path / "document", tmp_path / "whole")
    assert not list(tmp_path.glob("whole*"))


FORMS = {
    "sha256sum": lambda name, sha: f"{sha}  {name}\n",
    "binary": lambda name, sha: f"{sha} *{name}\n",
    "name first": lambda name, sha: f"{name} {sha}\n",
}


@pytest.mark.parametrize("form", [*FORMS, "json"])
def test_verify_against_checksums(tmp_path: Path, form: str) -> None:
    sharded(tmp_path)
    files = sorted(tmp_path.glob("document*"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    listing = tmp_path / ("sums.json" if form == "json" else "sums.txt")
    lines = [] if form == "json" else [FORMS[form](*item) for item in sums.items()]
    listing.write_text("".join(lines) or json.dumps(sums))
    for paths in ([], [tmp_path], files):
        found = list(verify(paths, listing))
        assert [(Path(r["path"]).name, r["sha256"]) for r in found] == list(sums.items())
        assert all(result["ok"] for result in found)
    damaged = tmp_path / "document-00001-of-00003.bin"
    data = bytearray(damaged.read_bytes())
    data[17] ^= 1
    damaged.write_bytes(data)
    files[0].unlink()
    results = []
    with pytest.raises(CheckError, match=r"2 wrong: .*00000-of-00003\.bin, .*00001-of-00003\.bin"):
        for result in verify([tmp_path], listing):
            results.append(result)
    assert [result["ok"] for result in results] == [False, False, True, True, True]


def test_verify_of_one_large_file_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    monkeypatch.setattr(files, "HASH_BYTES", 1000)
    data = bytes(range(256)) * 40  # 10,240 bytes
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "sums.txt").write_text(f"{hashlib.sha256(data).hexdigest()}  a.bin\n")
    assert [row["ok"] for row in verify([], tmp_path / "sums.txt")] == [True]
    shares = [round(100 * min(1000 * n, 10240) / 10240) for n in range(1, 12)]
    expected = [f"hashing 1 files: {share} % of 10,240 bytes" for share in shares]
    assert capsys.readouterr().err.splitlines() == expected


def test_verify_refuses_what_it_cannot_check(tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"{'a' * 64}  a.bin\n")
    with pytest.raises(InputError, match=r"no checksum of b\.bin"):
        list(verify([tmp_path / "b.bin"], tmp_path / "sums.txt"))
    (tmp_path / "sums.txt").write_text(f"{'a' * 64}  a.bin\nabc  b.bin\n")
    with pytest.raises(InputError, match=r"sums\.txt:2: .*no sha256 of 64 hex digits"):
        list(verify([], tmp_path / "sums.txt"))
    with pytest.raises(InputError, match=r"a\.idx: no such file; without one, give a file of"):
        list(verify([tmp_path / "a.bin"]))
    with pytest.raises(InputError, match=r"no \.idx file to verify"):
        list(verify([tmp_path]))


def test_verify_without_checksums_checks_the_index(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", DOCUMENTS)
    write_pair(tmp_path / "b", DOCUMENTS)
    assert [result["tokens"] for result in verify([tmp_path])] == [400, 400]
    assert next(verify([tmp_path / "a"]))["documents"] == 6
    (tmp_path / "b.bin").write_bytes((tmp_path / "b.bin").read_bytes()[:-2])
    results = []
    with pytest.raises(CheckError, match=r"1 wrong: .*b\.idx"):
        for result in verify([tmp_path]):
            results.append(result)
    assert results[0]["ok"] and "truncated: 798 bytes" in results[1]["error"]
