"""Text to .bin/.idx against one `encode` call a document, for any number of processes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zstandard
from kernel_proof import REPOSITORY, Mutant, assert_killed
from tokenizers import Tokenizer, models, pre_tokenizers

from pythia_fast import progress
from pythia_fast.data import build as building
from pythia_fast.data.build import build, prepare_quickstart, train_tokenizer
from pythia_fast.data.indexed import IndexedDataset
from pythia_fast.errors import InputError

SHARED = REPOSITORY.parent / "shared" / "data"
TEXTS = [f"def f{n}(x):\n    return x ** {n}  # naïve ☃ {'é' * (n % 5)}\n" for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 400, path)
    return path


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in texts)


def expected(tokenizer: Path, texts: list[str], eod: bool = True) -> list[list[int]]:
    encoder = Tokenizer.from_file(str(tokenizer))
    ids = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
    return [document + [0] * eod for document in ids if document]


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[n].tolist() for n in range(len(dataset))]


def test_jsonl(tmp_path: Path, tokenizer: Path) -> None:
    texts = [*TEXTS[:5], "", *TEXTS[5:]]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:30]) + b"\n  \n" + jsonl(texts[30:]).rstrip())
    built = build([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", workers=1)
    wanted = expected(tokenizer, texts)
    assert documents(tmp_path / "out") == wanted
    assert built.documents == 60 and built.empty == 1 and built.dtype == "uint16"
    assert built.tokens == sum(map(len, wanted))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_progress_counts_the_bytes_of_the_file_while_it_is_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BLOCK_BYTES", 100)
    random = np.random.default_rng(0)  # text that zstd leaves many blocks of
    path, data = tmp_path / f"a{suffix}", jsonl([random.bytes(40).hex() for _ in range(10_000)])
    path.write_bytes(zstandard.compress(data) if suffix.endswith("zst") else data)
    told: list[float] = []
    for _ in building.read_documents(path, "text", lambda amount, _: told.append(amount)):
        pass
    assert sum(told) == path.stat().st_size
    assert len(told) > 10 and max(told) < path.stat().st_size / 2


def test_one_large_file_is_not_silent(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 50))
    build([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", workers=1)
    shown = [
        int(share) for share in re.findall(r"encoding 1 files: (\d+) %", capsys.readouterr().err)
    ]
    assert shown == sorted(shown) and len(set(shown)) > 3 and shown[-1] == 100


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("empty documents kept", "for encoding in encodings if encoding.ids]", "for encoding in encodings]"),
        ("no end of text", "self.eod = [eod]", "self.eod = []"),
        ("last block lost", "    if block:\n        yield block", "    if False:\n        yield block"),
        ("last line lost", "    if tail:\n        yield tail", ""),
        ("lines cut at reads", "tail += decoder", "tail = decoder"),
        ("one frame only", "data = decoder.unused_data if decoder.eof", "data = b'' if decoder.eof"),
        ("blocks out of order", "ids = np.fromiter(chain.from_iterable(found)", "ids = np.fromiter(chain.from_iterable(found[::-1])"),
    ],
)  # fmt: skip
def test_mutants(tmp_path: Path, tokenizer: Path, name: str, old: str, new: str) -> None:
    texts = [*TEXTS[:7], "", *TEXTS[7:]]
    frames = [jsonl(texts[:30]), jsonl(texts[30:])[:-1]]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))

    def check(module: ModuleType) -> None:
        for module.BLOCK_BYTES in (100, 1 << 20):
            module.build([tmp_path / "a.jsonl.zst"], tokenizer, tmp_path / "out", workers=1)
            assert documents(tmp_path / "out") == expected(tokenizer, texts)

    check(building)
    assert_killed(Mutant(name, "pythia_fast/data/build.py", old, new), check, tmp_path)


def test_other_key_and_no_end_of_text(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    out = tmp_path / "deep" / "out"
    build([tmp_path / "a.jsonl"], tokenizer, out, key="content", append_eod=False, workers=1)
    assert documents(out) == expected(tokenizer, TEXTS, eod=False)


def test_a_directory_in_sorted_order(tmp_path: Path, tokenizer: Path) -> None:
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    (data / "c.jsonl").write_bytes(jsonl(TEXTS[4:9]))
    (data / "a.txt").write_text(TEXTS[0])
    frames = [zstandard.compress(jsonl(TEXTS[1:3])), zstandard.compress(jsonl(TEXTS[3:4])[:-1])]
    (data / "b" / "x.jsonl.zst").write_bytes(b"".join(frames))
    (data / "readme.md").write_text("not data")
    build([data], tokenizer, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == expected(tokenizer, TEXTS[:9])


def test_a_frame_that_spans_many_reads(tmp_path: Path, tokenizer: Path, monkeypatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS)))
    monkeypatch.setattr(building, "BLOCK_BYTES", 7)
    build([tmp_path / "a.jsonl.zst"], tokenizer, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == expected(tokenizer, TEXTS)


def test_the_bytes_do_not_depend_on_the_workers(
    tmp_path: Path, tokenizer: Path, monkeypatch
) -> None:
    monkeypatch.setattr(building, "BLOCK_BYTES", 5000)  # 40 blocks
    texts = [text * (1 + 997 * n % 83) for n, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    files = {}
    for workers in (1, 3):
        out = tmp_path / f"by{workers}"
        build([tmp_path / "a.jsonl"], tokenizer, out, workers=workers)
        files[workers] = [out.with_suffix(end).read_bytes() for end in (".bin", ".idx")]
    assert files[1] == files[3]
    assert documents(tmp_path / "by3") == expected(tokenizer, texts)


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w65498 w3")
    for size, dtype in ((65_499, "uint16"), (65_500, "int32")):
        model = models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0")
        words = Tokenizer(model)
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.save(str(tmp_path / "words.json"))
        arguments = ([tmp_path / "a.txt"], tmp_path / "words.json", tmp_path / dtype)
        assert build(*arguments, append_eod=False, workers=1).dtype == dtype
        assert documents(tmp_path / dtype) == [[65_498, 3]]
        with pytest.raises(InputError, match=r"words\.json: has no <\|endoftext\|>"):
            build(*arguments, workers=1)


GOOD = jsonl(TEXTS[:2])
BAD = {
    "not json": ("a.jsonl", GOOD + b"\n{'text': 1}\n", r"a\.jsonl:4: not JSON: "),
    "deep": ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: not JSON: "),
    "no object": ("a.jsonl", GOOD + b"3\n", r"a\.jsonl:3: no string under the key 'text'"),
    "no key": ("a.jsonl", GOOD + b'{"txt": ""}\n', r"a\.jsonl:3: no string under the key 'text'"),
    "no string": ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: no string under the key 'text'"),
    "no utf-8": ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8 at byte 10"),
    "no utf-8 text": ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 at byte 3"),
    "no zstd": ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: damaged zstd data"),
    "half zstd": ("a.jsonl.zst", zstandard.compress(GOOD)[:-3], r"a\.jsonl\.zst: truncated"),
    "unknown": ("a.csv", b"", r"a\.csv: the name does not end in \.txt, \.jsonl, \.jsonl\.zst"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_names_file_and_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, fault: str
) -> None:
    name, data, message = BAD[fault]
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=message):
        build([tmp_path / name], tokenizer, out / "document", workers=1)
    assert list(out.iterdir()) == []


def test_a_fault_in_a_worker_is_the_same_line(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"nonsense\n")
    with pytest.raises(InputError, match=r"a\.jsonl:3: not JSON"):
        build([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", workers=2)


def test_missing_input_and_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file or directory"):
        build([tmp_path / "nowhere"], tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="no files in"):
        build([tmp_path], tokenizer, tmp_path / "out")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="no such tokenizer file"):
        build([tmp_path / "a.txt"], tmp_path / "none.json", tmp_path / "out")
    with pytest.raises(InputError, match="not a tokenizers JSON file"):
        build([tmp_path / "a.txt"], tmp_path / "a.txt", tmp_path / "out")


def test_trained_tokenizer_is_in_the_form_of_neox(tmp_path: Path, tokenizer: Path) -> None:
    ours = Tokenizer.from_file(str(tokenizer))
    assert ours.token_to_id("<|endoftext|>") == 0 and ours.token_to_id("<|padding|>") == 1
    assert ours.get_vocab_size() == 400
    for text in ("ünseen 漢字\t\x00 text", *TEXTS):
        assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids  # NFC
    page = json.loads(tokenizer.read_text())
    if (SHARED / "20B_tokenizer.json").exists():
        theirs = json.loads((SHARED / "20B_tokenizer.json").read_text())
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            assert page[part]["type"] == theirs[part]["type"]
    train_tokenizer(TEXTS, 400, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == tokenizer.read_bytes()
    with pytest.raises(InputError, match="vocab_size 257 is below the 258"):
        train_tokenizer(TEXTS, 257, tmp_path / "small.json")


def test_the_real_tokenizer_on_real_text(tmp_path: Path) -> None:
    path = SHARED / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip("needs ../shared/data/20B_tokenizer.json and lambada_test.jsonl")
    lines = (SHARED / "lambada_test.jsonl").read_bytes().splitlines(keepends=True)[:40]
    (tmp_path / "lambada.jsonl").write_bytes(b"".join(lines))
    build([tmp_path / "lambada.jsonl"], path, tmp_path / "out", workers=1)
    texts = [json.loads(line)["text"] for line in lines]
    found = documents(tmp_path / "out")
    assert found == expected(path, texts)
    decoder = Tokenizer.from_file(str(path))
    assert [decoder.decode(document[:-1]) for document in found] == texts


def test_quickstart(tmp_path: Path, monkeypatch) -> None:
    corpus = [(f"m{n:03}.py", text) for n, text in enumerate(TEXTS)]
    monkeypatch.setattr(building, "standard_library_corpus", lambda: iter(corpus))
    prepare_quickstart(tmp_path, 400)
    tokenizer = tmp_path / "tokenizer.json"
    held_out = TEXTS[19::20]
    kept = [text for text in TEXTS if text not in held_out]
    assert len(held_out) == 3
    assert documents(tmp_path / "train/document") == expected(tokenizer, kept)
    assert documents(tmp_path / "valid/document") == expected(tokenizer, held_out)

    def digests() -> dict[str, str]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    with monkeypatch.context() as patch:
        patch.setattr(building, "train_tokenizer", None)  # not called: nothing to make
        prepare_quickstart(tmp_path, 400)
    (tmp_path / "valid/document.idx").unlink()
    prepare_quickstart(tmp_path, 400)
    assert digests() == before
    prepare_quickstart(tmp_path, 390)
    assert Tokenizer.from_file(str(tokenizer)).get_vocab_size() == 390


def test_standard_library_corpus() -> None:
    corpus = list(building.standard_library_corpus())
    names = [name for name, _ in corpus]
    assert len(set(names)) == len(names) > 300
    assert {"json/decoder.py", "argparse.py"} < set(names)
    assert not any("site-packages" in name or "/test" in name for name in names)
    assert dict(corpus)["json/decoder.py"] == Path(json.decoder.__file__).read_text()
    assert corpus == list(building.standard_library_corpus())
    assert np.median([len(text) for _, text in corpus]) > 1000
