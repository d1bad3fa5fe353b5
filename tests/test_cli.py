"""The command line: help, exit codes, one line for bad input, JSON lines on stdout."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from corpus import write_pair
from kernel_proof import REPOSITORY

from pythia_fast import checkpoint
from pythia_fast.cli import main
from pythia_fast.kernels import checks

COMMANDS = ["train", "data build", "data quickstart", "data join", "data view", "data digest",
            "data verify", "import", "export", "generate", "verify", "plan", "prebuild", "bench",
            "doctor"]  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """Runs a command that must fail; returns its one line on stderr."""
    assert main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert lines[-1].startswith("pythia-fast: "), err
    assert "Traceback" not in err
    return lines[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from pythia_fast.config import load
    from pythia_fast.train import train

    directory = tmp_path_factory.mktemp("cli")
    page = tiny_run.make_page(directory)
    train(load(page, ["--train.steps", "10"]), directory / "run")
    return page, directory / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"example: pythia-fast {command}" in capsys.readouterr().out


def test_verify_reads_every_checkpoint_of_a_run(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = trained
    assert main(["verify", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [checkpoint.directory(run, step) for step in checkpoint.steps(run)]
    assert [row["checkpoint"] for row in rows] == [str(path) for path in found]
    assert all(row["bytes"] > 0 for row in rows)
    copy = tmp_path / found[-1].name
    shutil.copytree(found[-1], copy)
    assert main(["verify", str(copy)]) == 0
    assert "every sha256 agrees" in capsys.readouterr().out
    (file,) = copy.glob("*.distcp")
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert "is damaged" in fails(capsys, "verify", copy, code=1)
    file.unlink()
    assert "is missing" in fails(capsys, "verify", copy)
    assert "no complete checkpoint" in fails(capsys, "verify", tmp_path)
    whole = tmp_path / "run"
    shutil.copytree(run, whole)
    (checkpoint.directory(whole, 10) / "manifest.json").unlink()  # of a run, all are looked at
    assert main(["verify", str(whole)]) == 1
    out, err = capsys.readouterr()
    assert out.count("every sha256 agrees") == len(found) - 1
    assert err.count("\n") == 1 and "step10: no complete checkpoint" in err


def test_a_run_without_a_step_of_its_own_ends_well(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported at the last step: there is nothing to train, and nothing to draw."""
    page, run = trained
    last = checkpoint.directory(run, 10)
    flags = ["--format", "neox", "--tensor", "2", "--ranks", "2"]
    assert main(["export", str(last), "--out", str(tmp_path / "neox"), *flags]) == 0
    assert main(["import", str(tmp_path / "neox"), "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["train", str(page), "--run", str(tmp_path / "run"), "--train.steps", "10"]) == 0
    out = capsys.readouterr().out
    assert "trained to step 10" in out and "none: no step was taken" in out


def test_help_needs_no_torch_and_starts_at_once() -> None:
    code = "import sys; from pythia_fast.cli import main\n"
    code += "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'triton', 'rich') if m in sys.modules])"
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.stdout.splitlines()[-1] == "[]", run.stdout
    assert time.perf_counter() - began < 5  # 0.1 s alone; a loaded machine gets room


BAD = [
    (["train", "missing.toml"], "missing.toml: no such file"),
    (["trian", "x.toml"], "invalid choice: 'trian'"),
    (
        ["train", "{page}", "--train.stepz", "1"],
        "unknown key train.stepz; did you mean train.steps?",
    ),
    (["train", "{page}", "--steps", "1"], "unexpected --steps 1; did you mean --train.steps?"),
    (["train", "{page}", "--train.steps", "many"], "expected a whole number"),
    (["train", "{page}", "--data.prefix", "nowhere/document"], "nowhere/document"),
    (
        ["train", "{page}", "--data.order", "sequential", "--train.steps", "900"],
        "the run needs 7200",
    ),
    (
        ["train", "{page}", "--log.sample", "x", "--data.tokenizer", "nope.json"],
        "nope.json: no such",
    ),
    (["data", "build", "x.txt", "--tokenizer", "t", "--out", "x", "--workers", "0"], "at least 1"),
    (["train", "{page}", "--data.prefix", ""], "data.prefix = '': name the token files"),
    (["train", "{page}", "--model.rotary_base", "0"], "model.rotary_base = 0.0 must be positive"),
    (["train", "{page}", "--kernels.backend", "triton"], "needs a GPU"),
    (["data", "view", "{page}", "--step", "5:5"], "--step 5:5: expected 0 <= A < B"),
    (["data", "view", "{page}", "--step", "x"], "expected A or A:B"),
    (["data", "view", "{page}", "--step", "40"], "not within the 40 steps"),
    (["data", "digest", "{page}", "--against", "nowhere"], "no ledger there"),
    (["data", "build", "nothing.txt", "--tokenizer", "t.json", "--out", "x"], "nothing.txt"),
    (["doctor", "--train.steps", "1"], "takes no configuration keys"),
    (["generate", "nowhere", "--prompt", "x"], "nowhere"),
    (["export", "nowhere", "--out", "x"], "nowhere"),
    (["generate", "{run}", "--prompt", "x"], "newest is {run}/checkpoints/step10"),
    (["export", "{run}", "--out", "x"], "newest is {run}/checkpoints/step10"),
    (["export", "{step}", "--out", "x", "--tensor", "2"], "--tensor goes with --format neox alone"),
    (["export", "{step}", "--out", "x", "--ranks", "1"], "--ranks goes with --format neox alone"),
    (["export", "{step}", "--out", "x", "--format", "neox", "--tensor", "0"], "--tensor 0: at least 1"),
    (["export", "{step}", "--out", "x", "--format", "neox", "--ranks", "0"], "--ranks 0: at least 1"),
    (["export", "{step}", "--out", "x", "--format", "neox", "--hidden-act", "gelu"],
     "--hidden-act goes with --format hf alone"),
    (["export", "{step}", "--out", "x", "--format", "neox", "--dtype", "fp16"],
     "--dtype goes with --format hf alone"),
    (["import", "nowhere", "--run", "x"], "nowhere: no such directory"),
    (["import", "{page}", "--run", "x"], "{page}: no such directory"),
    (["import", "{step}", "--run", "x", "--yaml", "y.yml"],
     "{step}: neither a Hugging Face directory (config.json) nor a NeoX checkpoint (global_step<N>)"),
    (["train", "{run}"], "{run} is a directory, expected a page"),
    (["plan", "{run}"], "{run} is a directory, expected a page"),
    (["plan", "{page}", "--gpu", "v100"], "--gpu V100: its rates are not known here; H"),
    (["train", "{page}", "--run", "{page}"], "{page} is not a directory"),
    (["train", "{page}", "--run", "{page}/x"], "{page} is not a directory"),
    (["train", "{page}", "--recipe", "pythia"], "expected '' or 'pythia-v1' or 'modern'"),
    (["train", "{page}", "--recipe", "pythia-v1", "--precision.sum_ranks", "3"], "not divisible"),
    (["train", "{page}", "--optimizer.norm_copys", "2"], "did you mean optimizer.norm_copies?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_ends_with_one_line_and_code_2(
    arguments: list[str], message: str, trained: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "INTERPRETED", False)
    page, run = trained
    paths = {"page": page, "run": run, "step": run / "checkpoints" / "step10"}
    line = fails(capsys, *(a.format(**paths) for a in arguments))
    assert message.format(**paths) in line
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_tokenizer_beyond_the_vocabulary_is_refused_at_the_start(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where the prompt's own ids would fit: what the model continues with might not."""
    from pythia_fast.data.build import train_tokenizer

    tokenizer, (page, run) = tmp_path / "tokenizer.json", trained
    train_tokenizer(["def f(x):\n"], 258, tokenizer)
    wanted = f"{tokenizer}: token id 257 is beyond the model's vocabulary 64"
    new = tmp_path / "new"
    line = fails(capsys, "train", page, "--data.tokenizer", tokenizer, "--run", new)
    assert wanted in line and not new.exists()
    step = run / "checkpoints" / "step10"
    for prompt in ("!", "def f"):  # "!" is id 2
        assert wanted in fails(
            capsys, "generate", step, "--tokenizer", tokenizer, "--prompt", prompt
        )
    assert wanted in fails(capsys, "export", step, "--tokenizer", tokenizer, "--out", new)


def test_truncated_bin_and_corrupt_idx_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tiny_run.make_page(tmp_path)
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-10])
    line = fails(capsys, "train", page, "--run", tmp_path / "run")
    assert "train.bin" in line and str(len(whole)) in line and str(len(whole) - 10) in line
    (tmp_path / "train.bin").write_bytes(whole)
    index = bytearray((tmp_path / "train.idx").read_bytes())
    index[0:9] = b"NOTANIDX!"
    (tmp_path / "train.idx").write_bytes(index)
    assert "train.idx" in fails(capsys, "train", page, "--run", tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == []


def test_explain_prints_every_switch_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pythia_fast.recipe import SWITCHES

    monkeypatch.chdir(tmp_path)
    page = REPOSITORY / "configs" / "pythia-12b.toml"
    assert main(["train", str(page), "--explain", "--json", "--optimizer.lr", "1e-4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["switch"] for row in rows] == [*(s.key for s in SWITCHES), "optimizer.lr"]
    switches = {row["switch"]: row for row in rows}
    copies = switches["optimizer.row_bias_copies"]
    assert (copies["value"], copies["pythia-v1"], copies["modern"]) == (4, 4, 1)
    assert all(row["reason"] and row["source"] and row["what"] for row in rows[:-1])
    assert [row["switch"] for row in rows if row["differs"]] == ["optimizer.lr"]
    assert (rows[-1]["value"], rows[-1]["published"]) == (1e-4, 1.2e-4)
    assert main(["train", str(page), "--explain", "--recipe", "modern"]) == 0
    text = capsys.readouterr().out
    assert 'recipe = "modern", preset pythia-12b' in text
    assert all(f"{s.key} " in text and s.reason in text and s.source in text for s in SWITCHES)
    assert 'optimizer.schedule = "cosine" (published: "neox-v1")' in text
    assert main(["train", str(page), "--explain"]) == 0
    assert "every key is that of the published pythia-12b" in capsys.readouterr().out
    for size, keys in (
        ("14m", {"model.rope_table", "optimizer.schedule"}),
        ("31m", {"model.rope_table", "optimizer.schedule"}),
        ("1b", {"train.micro_batch_size", "optimizer.lr", "optimizer.min_lr",
                "precision.gradient_sum", "precision.loss_scaling"}),
        ("1b-deduped", {"optimizer.lr", "optimizer.min_lr"}),
    ):  # fmt: skip
        page = str(REPOSITORY / "configs" / f"pythia-{size}.toml")
        assert main(["train", page, "--explain"]) == 0
        text = capsys.readouterr().out
        assert "every key is that of" not in text
        assert set(re.findall(r"^unverified: (\S+) = ", text, re.M)) == keys
        assert main(["train", page, "--explain", "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {row["switch"] for row in rows if row["unverified"]} == keys
        assert not any(row["differs"] for row in rows)
    assert main(["train", str(REPOSITORY / "configs" / "quickstart.toml"), "--explain"]) == 0
    assert "there is no published run to compare with" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_view_digest_and_ledger_agree(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    page, run = trained
    assert main(["data", "view", str(page), "--step", "2:4", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["step"], r["row"]) for r in rows] == [
        (s, 8 * s + i) for s in (2, 3) for i in range(8)
    ]
    assert all(len(r["tokens"]) == 17 and set(r) == {"step", "row", "tokens"} for r in rows)
    # the ledger's digest, from the viewed tokens alone
    import hashlib
    import struct

    ids = [t for r in rows if r["step"] == 2 for t in r["tokens"]]
    expected = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
    assert tiny_run.rows(run / "ledger.jsonl")[2]["digest"] == expected
    flags = ["--train.steps", "10", "--against", str(run), "--json"]
    assert main(["data", "digest", str(page), *flags]) == 0
    digests = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert digests == tiny_run.rows(run / "ledger.jsonl")


def test_digest_against_a_ledger_of_other_data_fails(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tiny_run.make_page(tmp_path)
    write_pair(tmp_path / "train", tiny_run.documents(300, seed=5))
    code = main(["data", "digest", str(page), "--train.steps", "10", "--against", str(trained[1])])
    assert code == 1
    assert "the data of step 0 differs from its ledger" in capsys.readouterr().err


def test_digest_against_a_ledger_with_holes_fails(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (trained[1] / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text(lines[0] + lines[1] + lines[4])
    code = main(["data", "digest", str(trained[0]), "--against", str(tmp_path)])
    assert code == 1
    assert "its ledger has no step 2" in capsys.readouterr().err


def test_a_run_that_is_done_stays_done(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    page, run = trained
    before = checkpoint.verify(checkpoint.directory(run, 10))
    assert main(["train", str(page), "--train.steps", "10", "--run", str(run), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 10 and Path(summary["loss_figure"]).read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.verify(checkpoint.directory(run, 10)) == before
    assert len(tiny_run.rows(run / "metrics.jsonl")) == 10


def test_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    rows = {row["what"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["torch"]["ok"] and rows["python"]["ok"]
    assert rows["GPU"]["found"]


def test_generate_and_export_from_a_trained_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole small life: text, tokenizer, corpus, training, a continuation, an export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pythia_fast.data.build import train_tokenizer

    text = "def f(x):\n    return x + 1\n" * 400
    (tmp_path / "corpus.txt").write_text(text)
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([text], 300, tokenizer)
    assert main(["data", "build", str(tmp_path / "corpus.txt"), "--tokenizer", str(tokenizer),
                 "--out", str(tmp_path / "doc" / "document"), "--workers", "1"]) == 0  # fmt: skip
    page = tmp_path / "page.toml"
    page.write_text(
        tiny_run.PAGE.format(data=tmp_path)
        .replace(f'valid_prefix = "{tmp_path}/valid"', f'tokenizer = "{tokenizer}"')
        .replace(f"{tmp_path}/train", f"{tmp_path}/doc/document")
        .replace("vocab_size = 64", "vocab_size = 304")
        .replace("steps = 40", "steps = 30")
    )
    capsys.readouterr()
    assert main(["train", str(page), "--run", str(tmp_path / "run"), "--log.sample", "def "]) == 0
    assert "sample: 'def " in capsys.readouterr().out
    step = tmp_path / "run" / "checkpoints" / "step30"
    flags = ["--max-new-tokens", "8", "--json"]
    assert main(["generate", str(step), "--prompt", "def f", "--prompt", "return", *flags]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "tokens", "text"}] * 2
    assert main(["export", str(step), "--out", str(tmp_path / "hf"), "--dtype", "fp32",
                 "--hidden-act", "gelu_pytorch_tanh", "--json"]) == 0  # fmt: skip
    row = json.loads(capsys.readouterr().out)
    assert row == {"directory": str(tmp_path / "hf"), "format": "hf", "dtype": "fp32"}
    assert main(["import", str(tmp_path / "hf"), "--run", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    again = str(tmp_path / "again" / "checkpoints" / "step0")  # knows the folder's tokenizer
    assert main(["generate", again, "--prompt", "def f", *flags]) == 0
    assert json.loads(capsys.readouterr().out) == rows[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    coder = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for row in rows:
        ids = coder(row["prompt"], return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert row["tokens"] == new[: len(row["tokens"])]
        assert coder.decode(row["tokens"]) == row["text"]


def test_an_imported_model_trains_on(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """export, import, train: the first loss is that of the exported weights, not of a fresh model."""
    from pythia_fast.data.build import train_tokenizer

    page, run = trained
    step = run / "checkpoints" / "step10"
    assert main(["export", str(step), "--out", str(tmp_path / "fp16")]) == 0
    assert capsys.readouterr().out == f"exported to {tmp_path / 'fp16'}, weights in fp16\n"
    assert main(["export", str(step), "--out", str(tmp_path / "neox"), "--format", "neox"]) == 0
    assert capsys.readouterr().out == f"exported to {tmp_path / 'neox'}, weights in fp32\n"
    assert main(["export", str(step), "--out", str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    new = tmp_path / "run"
    assert main(["import", str(tmp_path / "hf"), "--run", str(new)]) == 0
    capsys.readouterr()
    assert "holds a run already" in fails(capsys, "import", tmp_path / "hf", "--run", new)
    line = fails(capsys, "import", tmp_path / "hf", "--run", tmp_path / "y", "--yaml", "y.yml")
    assert "--yaml goes with a NeoX checkpoint" in line and not (tmp_path / "y").exists()
    train_tokenizer(["def f(x):"], 258, tmp_path / "hf" / "tokenizer.json")
    line = fails(capsys, "import", tmp_path / "hf", "--run", tmp_path / "y")
    assert "tokenizer.json: token id 257 is beyond the model's vocabulary 64" in line
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert main(["train", str(page), "--train.steps", "4", "--run", str(new)]) == 0
    losses = [row["loss"] for row in tiny_run.rows(new / "metrics.jsonl")]
    before = [row["loss"] for row in tiny_run.rows(run / "metrics.jsonl")]
    assert losses[0] < 0.9 * before[0]
    assert checkpoint.steps(new) == [0, 1, 2, 4]
    other = tmp_path / "other"
    assert main(["import", str(tmp_path / "hf"), "--run", str(other)]) == 0
    capsys.readouterr()
    line = fails(capsys, "train", page, "--run", other, "--model.hidden", "64")
    assert "was trained with model.hidden = 32, not 64" in line


def test_verify_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  document.bin\n")
    assert main(["data", "verify", "--checksums", str(tmp_path / "SHA256SUMS")]) == 1
    out, err = capsys.readouterr()
    assert "document.bin: wrong: missing" in out and "Traceback" not in err
