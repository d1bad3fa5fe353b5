"""The trainer: learning, bit-exact resume after kills and signals, the ledger, refusals."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_run
from corpus import write_pair
from kernel_proof import Mutant, assert_killed
from tiny_run import train_stopping_at

import pythia_fast.train as real
from pythia_fast import checkpoint, ledger
from pythia_fast.config import load
from pythia_fast.data.commands import digest
from pythia_fast.errors import CheckError, InputError

EXPECTED_STEPS = [0, 1, 2, 4, 8, 16, 30, 32, 35, 40]  # 30 and 35: the newest rolling ones


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(page, run) of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("straight")
    page = tiny_run.make_page(directory)
    real.train(load(page), directory / "run")
    return page, directory / "run"


def test_a_run_learns_and_writes_what_it_promises(straight: tuple[Path, Path]) -> None:
    page, run = straight
    config = load(page)
    metrics = tiny_run.rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 41))
    assert all(row["tokens"] == row["step"] * 8 * 16 for row in metrics)
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"} <= metrics[0].keys()
    assert metrics[0]["loss"] == pytest.approx(np.log(64), abs=0.3)
    assert metrics[-1]["loss"] < 2.5 < metrics[0]["loss"]
    assert [row["step"] for row in metrics if "valid_loss" in row] == [20, 40]
    assert metrics[-1]["valid_loss"] < 2.5
    assert checkpoint.steps(run) == EXPECTED_STEPS
    assert load(run / "config.toml") == config


def test_the_first_update_moves_nothing_as_in_the_original(straight: tuple[Path, Path]) -> None:
    first, second = (
        checkpoint.load_all(checkpoint.directory(straight[1], step)) for step in (0, 1)
    )
    assert all((first[name] == second[name]).all() for name in first)
    moments = checkpoint.load_all(checkpoint.directory(straight[1], 1), prefix="exp_avg.")
    assert any(m.abs().max() > 0 for m in moments.values())


def test_the_ledger_is_what_data_digest_recomputes(straight: tuple[Path, Path]) -> None:
    page, run = straight
    ledger = tiny_run.rows(run / "ledger.jsonl")
    assert ledger == list(digest(load(page), 0, 40))
    assert (
        checkpoint.read_manifest(checkpoint.directory(run, 40))["ledger"] == ledger[-1]["running"]
    )
    assert ledger[3]["first_row"] == 24 and ledger[3]["last_row"] == 31


def test_microbatches_do_not_change_the_step(straight: tuple[Path, Path], tmp_path: Path) -> None:
    page, run = straight
    whole = tmp_path / "whole"
    real.train(load(page, ["--train.micro_batch_size", "8"]), whole)
    ours = [row["loss"] for row in tiny_run.rows(run / "metrics.jsonl")]
    other = [row["loss"] for row in tiny_run.rows(whole / "metrics.jsonl")]
    np.testing.assert_allclose(ours, other, rtol=1e-4)
    np.testing.assert_allclose(ours[:5], other[:5], rtol=1e-6)


STEP_MUTANTS = [
    Mutant("microbatches each count as a step", "pythia_fast/train.py", "positions = tokens[:, 1:].numel()", "positions = tokens[: c.train.micro_batch_size, 1:].numel()"),
    Mutant("only the last microbatch counts", "pythia_fast/train.py", "optimizer.accumulate()\n", "optimizer.fresh = True; optimizer.accumulate()\n"),
    Mutant("learning rate one step ahead", "pythia_fast/train.py", "learning_rate(c.optimizer, count, c.train.steps)", "learning_rate(c.optimizer, count + 1, c.train.steps)"),
    Mutant("optimizer state not loaded", "pythia_fast/train.py", "self.optimizer.resume_at(", "self.optimizer.exp_avg.zero_(); self.optimizer.resume_at("),
    Mutant("step count not restored", "pythia_fast/train.py", "manifest.get(\"updates\", step), ", "0, "),
    Mutant("resume one batch late", "pythia_fast/train.py", "self.rows, c.train.batch_size, self.step,", "self.rows, c.train.batch_size, self.step + (self.step > 0),"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", STEP_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_step_and_resume_are_killed(
    mutant: Mutant, straight: tuple[Path, Path], tmp_path: Path
) -> None:
    page, run = straight

    def check(module: ModuleType) -> None:
        train_stopping_at(module, load(page), tmp_path / "run", 21)
        module.train(load(page), tmp_path / "run")
        assert tiny_run.result(tmp_path / "run", 40) == tiny_run.result(run, 40)

    assert_killed(mutant, check, tmp_path)


def test_stopped_and_resumed_equals_uninterrupted(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    page, run = straight
    train_stopping_at(real, load(page), tmp_path / "run", 21)
    assert checkpoint.newest(tmp_path / "run") == 21
    real.train(load(page), tmp_path / "run")
    ours, expected = tiny_run.result(tmp_path / "run", 40), tiny_run.result(run, 40)
    assert ours == expected


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    """SIGKILL at three random moments, wherever they fall: in a step, while saving, between."""
    page, expected = straight
    run = tmp_path / "run"
    moments = random.Random()
    for kill_at in sorted(moments.sample(range(1, 39), 3)):
        process = tiny_run.start(page, run)

        def reached(at: int = kill_at) -> bool:
            return len(tiny_run.rows(run / "metrics.jsonl")) >= at

        if tiny_run.wait_for(reached, process):
            try:
                process.wait(timeout=moments.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                process.kill()
        tiny_run.finish(process)
    code, out, err = tiny_run.finish(tiny_run.start(page, run, "--json"))
    assert code == 0, err
    assert '"step": 40' in out
    assert tiny_run.result(run, 40) == tiny_run.result(expected, 40)


def test_sigterm_saves_and_exits_143(straight: tuple[Path, Path], tmp_path: Path) -> None:
    page, _ = straight
    run = tmp_path / "run"
    process = tiny_run.start(page, run, "--train.steps", "4000", "--checkpoint.every", "0")
    tiny_run.wait_for(lambda: len(tiny_run.rows(run / "metrics.jsonl")) >= 3, process)
    process.terminate()
    code, _, err = tiny_run.finish(process)
    assert code == 143, err
    saved = checkpoint.newest(run)
    assert saved == tiny_run.rows(run / "metrics.jsonl")[-1]["step"]
    assert "the same command continues" in err


def test_a_second_trainer_on_the_same_run_is_refused(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    page, _ = straight
    run = tmp_path / "run"
    first = tiny_run.start(page, run, "--train.steps", "100000")
    try:
        tiny_run.wait_for(lambda: (run / "metrics.jsonl").exists(), first)
        with pytest.raises(InputError, match=rf"{first.pid}.* is training in"):
            real.train(load(page, ["--train.steps", "100000"]), run)
    finally:
        first.kill()
        tiny_run.finish(first)


def test_changed_data_are_refused_by_the_first_differing_step(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    config = load(page)
    run = tmp_path / "run"
    train_stopping_at(real, config, run, 20)
    step = 13
    target = next(real.rows_from(config).tokens(step * 8, step * 8 + 1)[0, k] for k in (3,))
    changed = tiny_run.documents(300, 0)
    # change one token that step 13 reads and say which step is the first to see that token
    before = list(digest(config, 0, 20))
    for number, document in enumerate(changed):
        if target in document:
            edited = document.copy()
            edited[np.flatnonzero(document == target)[0]] = (target + 1) % 64
            write_pair(tmp_path / "train", [*changed[:number], edited, *changed[number + 1 :]])
            after = list(digest(config, 0, 20))
            first = next((a["step"] for a, b in zip(before, after, strict=True) if a != b), None)
            if first is not None:
                break
    with pytest.raises(
        InputError, match=rf"differs from what was trained on, first at step {first} "
    ):
        real.train(config, run)
    write_pair(tmp_path / "train", changed)
    real.train(config, run)


def test_another_recipe_on_the_same_run_is_refused(straight: tuple[Path, Path]) -> None:
    page, run = straight
    with pytest.raises(InputError, match=r"was trained with optimizer\.lr = 0\.01, not 0\.02"):
        real.train(load(page, ["--optimizer.lr", "0.02"]), run)


def test_a_disk_that_refuses_keeps_the_previous_checkpoint(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    """A real limit on file sizes, smaller than a checkpoint's, set for a resumed process."""
    page, _ = straight
    run = tmp_path / "run"
    train_stopping_at(real, load(page), run, 21)
    before = tiny_run.result(run, 21)["tensors"]
    limit = ["bash", "-c", 'ulimit -f 64; exec "$@"', "limited"]
    process = tiny_run.start(page, run)
    process.kill()
    tiny_run.finish(process)
    command = subprocess.run(
        [*limit, *map(str, process.args)], cwd=tiny_run.REPOSITORY, capture_output=True, text=True
    )  # type: ignore[arg-type]
    assert command.returncode == 2, command.stderr
    assert "disk full while saving step 25" in command.stderr.splitlines()[-1]
    assert "step 21" in command.stderr.splitlines()[-1]
    assert checkpoint.newest(run) == 21
    assert tiny_run.result(run, 21)["tensors"] == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_loss_that_is_not_finite_ends_the_run(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--optimizer.lr", "1e30", "--optimizer.min_lr", "0", "--optimizer.warmup", "0"]
    with pytest.raises(CheckError, match=r"step 2: loss nan.*newest checkpoint is step 1 "):
        real.train(load(straight[0], flags), tmp_path / "run")


def test_a_token_beyond_the_vocabulary_is_named(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    page = tiny_run.make_page(tmp_path)
    spoilt = tiny_run.documents(300, 0)
    spoilt[150] = np.full(200, 64)
    write_pair(tmp_path / "train", spoilt)
    with pytest.raises(
        InputError, match=r"step \d+, row \d+, position \d+: token id 64 is outside"
    ):
        real.train(load(page), tmp_path / "run")


def test_bf16_weights_follow_an_fp32_master(straight: tuple[Path, Path], tmp_path: Path) -> None:
    page, run = straight
    last = real.train(load(page, ["--precision.compute", "bf16"]), tmp_path / "run")
    reference = tiny_run.rows(run / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(reference["loss"], rel=0.1)
    saved = checkpoint.load_all(checkpoint.directory(tmp_path / "run", 40))
    assert all(t.dtype.itemsize == 4 for t in saved.values())
    assert any((t.bfloat16().float() != t).any() for t in saved.values())


def test_bf16_resumes_bit_for_bit(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    config = load(page, ["--precision.compute", "bf16", "--train.steps", "12"])
    real.train(config, tmp_path / "straight")
    train_stopping_at(real, config, tmp_path / "resumed", 10)
    real.train(config, tmp_path / "resumed")
    straight, resumed = (tiny_run.result(tmp_path / n, 12) for n in ("straight", "resumed"))
    assert straight == resumed


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_step_and_save_ends_the_next_step(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives during validation, after the step has decided whether to save."""
    page = tiny_run.make_page(tmp_path)
    validate = real.Trainer.validate

    def signalled(self: real.Trainer) -> float:
        signal.raise_signal(signum)
        return validate(self)

    monkeypatch.setattr(real.Trainer, "validate", signalled)
    with pytest.raises(real.Stopped, match="saved at step 21") as stopped:
        real.train(load(page), tmp_path / "run")
    assert stopped.value.signum == signum
    assert checkpoint.newest(tmp_path / "run") == 21


def test_rows_are_logged_when_due_however_the_run_was_stopped(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    config = load(page, ["--log.every", "7", "--train.valid_every", "20"])
    train_stopping_at(real, config, tmp_path / "run", 23)
    real.train(config, tmp_path / "run")
    steps = [row["step"] for row in tiny_run.rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [7, 14, 20, 21, 28, 35, 40]


def test_a_mistake_before_the_first_checkpoint_can_be_put_right(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    wrong = ["--data.prefix", "nowhere/x", "--train.batch_size", "4"]
    with pytest.raises(InputError, match="nowhere"):
        real.train(load(page, wrong), tmp_path / "run")
    real.train(load(page, ["--train.steps", "2"]), tmp_path / "run")


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Path]:
    """(page, run) of a run stopped at step 21."""
    page = tiny_run.make_page(tmp_path)
    train_stopping_at(real, load(page), tmp_path / "run", 21)
    return page, tmp_path / "run"


def test_the_checkpoint_itself_knows_its_recipe(stopped: tuple[Path, Path]) -> None:
    page, run = stopped
    (run / "config.toml").unlink()
    with pytest.raises(InputError, match=r"step21 was trained with model\.heads = 2, not 4"):
        real.train(load(page, ["--model.heads", "4"]), run)


def test_a_forged_ledger_is_refused(stopped: tuple[Path, Path]) -> None:
    page, run = stopped
    path = run / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    forged = lines.copy()
    forged[5] = forged[5].replace(b'"digest": "', b'"digest": "0')
    for damage, message in (
        (forged, "is not the ledger of the checkpoint at step 21"),
        (lines[:5] + lines[6:], "20 rows where 21 are needed"),
        ([*lines[:5], lines[5][:30] + b"\n", *lines[6:]], "line 6 is damaged"),
    ):
        path.write_bytes(b"".join(damage))
        with pytest.raises(InputError, match=message):
            real.train(load(page), run)
        assert path.read_bytes() == b"".join(damage)  # refused, and left as it was
    path.write_bytes(b"".join(lines))
    real.train(load(page), run)


def test_held_out_tokens_are_checked_before_training(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    write_pair(tmp_path / "valid", [*tiny_run.documents(20, 1)[:3], np.full(60, 77)])
    with pytest.raises(InputError, match=r"valid: .*row \d+, position \d+: token id 77 is outside"):
        real.train(load(page), tmp_path / "run")
    with pytest.raises(InputError, match=r"valid holds \d+ rows, train\.valid_rows = 5000"):
        real.train(load(page, ["--train.valid_rows", "5000"]), tmp_path / "run")


def test_a_long_run_is_verified_in_samples_and_the_first_difference_found(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    page, run = straight
    assert list(ledger.to_verify(0, 2000, 1_000_000, data_changed=True)) == list(range(2000))
    assert list(ledger.to_verify(0, 2000, 100, data_changed=False)) == list(range(2000))
    sampled = ledger.to_verify(0, 143_000, 2_097_152, data_changed=False)
    assert len(sampled) == 256 and sampled[0] == 0 and sampled[-1] == 142_999

    class Differing:
        """The run's rows, but for those of step 3 and later."""

        def tokens(self, start: int, stop: int) -> np.ndarray:
            tokens = real.rows_from(load(page)).tokens(start, stop)
            return tokens if start < 24 else (tokens + 1) % 64

    with pytest.raises(InputError, match="first at step 3 "):
        ledger.verify(run, Differing(), 8, [0, 2, 10, 20, 39])  # type: ignore[arg-type]
    ledger.verify(run, real.rows_from(load(page)), 8, [0, 2, 10, 20, 39])


def test_a_damaged_checkpoint_names_the_one_before_it(stopped: tuple[Path, Path]) -> None:
    page, run = stopped
    shard = next((run / "checkpoints" / "step21").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckError, match=r"remove .*step21 to continue from step 20"):
        real.train(load(page), run)
