"""Kernels compiled before a run: a rehearsal launches what the run does, and its kernels are found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fused_run
import pytest
import rehearsed
from kernel_proof import REPOSITORY

pytest.importorskip("triton.backends.nvidia")

import triton
from triton.runtime.interpreter import InterpretedFunction

from pythia_fast import prebuilt
from pythia_fast.cli import main
from pythia_fast.config import Config, to_toml
from pythia_fast.errors import InputError
from pythia_fast.kernels import checks

needs_interpreter = pytest.mark.skipif(not checks.INTERPRETED, reason="compares interpreted runs")
FP16 = ["--precision.compute", "fp16", "--precision.loss_scaling", "hysteresis"]
PAGES = {
    "fused": [*FP16, "--precision.gradients", "fp32"],
    "as published": [*FP16, "--precision.gradients", "fp16"],
    "odd sizes": [*FP16, "--data.seq_len", "17", "--model.vocab_size", "75"],
}


def page(directory: Path, *flags: str) -> tuple[Config, Path]:
    config = fused_run.page(directory, *flags)
    path = directory / "resolved.toml"
    path.write_text(to_toml(config))
    return config, path


def rehearse(
    what: str, path: Path, repository: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    known = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", prebuilt.VARIABLE)
    }
    code = (
        "import json, os, runpy, sys; sys.path[:] = [os.environ['COPY'], *json.loads(sys.argv.pop(1))];"
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, json.dumps(sys.path),
         str(REPOSITORY / "tests/support/rehearsed.py"), what, str(path)],
        env=known | {"COPY": str(repository)} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def launches_of_a_run(config: Config, run: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of a step under the interpreter, and of a microbatch of held-out rows."""
    seen = set()
    interpret = InterpretedFunction.run

    def recorded(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = {k: v for k, v in keywords.items() if k not in ("grid", "warmup")}
        seen.add(rehearsed.facts(self.__name__, given))
        return interpret(self, *arguments, **keywords)

    trainer = fused_run.fresh(config, run)
    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", recorded)
        trainer.train_step(fused_run.batch(trainer, 0))
        trainer.validate()
    return seen


@needs_interpreter
@pytest.mark.parametrize("form", PAGES)
def test_a_rehearsal_launches_what_the_run_does(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types, constants, integers, alignment of every launch: what Triton's keys are made of."""
    config, path = page(tmp_path, *PAGES[form])
    ran = launches_of_a_run(config, tmp_path / "run", monkeypatch)
    assert len(ran) > 10
    assert set(rehearse("launches", path).stdout.splitlines()) == ran


FAULTS = {
    "an address without its offset": ("self._offset = int(tensor.storage_offset())", "self._offset = 0"),
    "one microbatch, which adds nothing": ("count = 2 * config", "count = 1 * config"),
    "nothing without gradients": ("if config.data.valid_prefix:", "if False:"),
    "loss scaling skips the update": ("__bool__ = lambda self: True", "__bool__ = lambda self: False"),
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_rehearsal_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "pythia_fast", copy / "pythia_fast", symlinks=True)
    (copy / "kernels").symlink_to(REPOSITORY / "kernels")
    file = copy / "pythia_fast/rehearsal.py"
    old, new = FAULTS[fault]
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    found = False
    for form in ("as published", "odd sizes"):
        config, path = page(tmp_path, *PAGES[form])
        ran = launches_of_a_run(config, tmp_path / form, monkeypatch)
        found |= set(rehearse("launches", path, copy).stdout.splitlines()) != ran
    assert found


# --- the directory --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A page and the directory of its kernels."""
    where = tmp_path_factory.mktemp("prebuilt")
    flags = ["--precision.compute", "bf16", "--model.hidden", "64", "--kernels.backend", "auto"]
    _, path = page(where, *flags)
    assert main(["prebuild", str(path), "--gpu", "h100", "--out", str(where / "kernels")]) == 0
    return path, where / "kernels"


def test_a_run_compiles_nothing(built: tuple[Path, Path], tmp_path: Path) -> None:
    path, directory = built
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), prebuilt.VARIABLE: str(directory)}
    done = rehearse("cubins", path, **environment)
    assert (done.stdout, prebuilt.VARIABLE in done.stderr) == ("0\n", False)
    assert not (tmp_path / "cache").exists()


def test_a_mismatch_compiles_and_says_so_once(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A kernel that is gone, and one whose source is another: two are compiled, one line is said."""
    path, directory = built
    own, copy = tmp_path / "kernels", tmp_path / "copy"
    shutil.copytree(directory, own)
    removed = next(own.glob("*/_adamw_kernel.json")).parent
    shutil.rmtree(removed)
    for part in ("kernels", "pythia_fast"):
        shutil.copytree(REPOSITORY / part, copy / part, symlinks=True)
    file = copy / "kernels/gelu.py"
    assert file.read_text().count("b_u = b_x + b_bias[None, :]") == 1
    file.write_text(file.read_text().replace("b_x + b_bias[None, :]", "b_bias[None, :] + b_x"))
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), prebuilt.VARIABLE: str(own)}
    done = rehearse("cubins", path, copy, **environment)
    assert done.stdout == "2\n"
    said = [line for line in done.stderr.splitlines() if prebuilt.VARIABLE in line]
    assert len(said) == 1 and "compiled now" in said[0]


def test_building_again_keeps_what_is_there(
    built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, directory = built
    files = {f: f.stat().st_mtime_ns for f in directory.glob("*/*")}
    command = ["prebuild", str(path), "--gpu", "H100", "--out", str(directory), "--json"]
    assert main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["compiled"], row["kept"], row["launched"]) == (0, len(files) // 2, row["launched"])
    assert {f: f.stat().st_mtime_ns for f in directory.glob("*/*")} == files


@pytest.fixture
def use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], Any]:
    """use_prebuilt() on a directory: (Triton's manager of caches, what was said)."""
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)

    def call(directory: Path) -> tuple[Any, str]:
        monkeypatch.setenv(prebuilt.VARIABLE, str(directory))
        prebuilt.use_prebuilt()
        return triton.knobs.cache.manager_class, capsys.readouterr().err

    return call


def test_of_another_triton_it_is_left_alone(use: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"triton": "3.0.0", "kernels": []}')
    manager, said = use(tmp_path)
    assert manager is not prebuilt.PrebuiltCache
    assert f"is of triton 3.0.0, this is {triton.__version__}" in said and said.count("\n") == 1


@pytest.mark.parametrize("manifest", [None, "no JSON", "[]", '{"kernels": []}'])
def test_no_such_directory_is_bad_input(
    use: Callable[[Path], Any], tmp_path: Path, manifest: str | None
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"no manifest.json of `pythia-fast prebuild` there"):
        use(tmp_path)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = page(tmp_path)
    out = tmp_path / "out"
    for flags, line in (
        (["--gpu", "V100"], "--gpu V100: not one of A100, H100, H200, B200"),
        (["--gpu", "H100", "--parallel.tensor", "2"], "not rehearsed yet"),
    ):
        assert main(["prebuild", str(path), "--out", str(out), *flags]) == 2
        assert line in capsys.readouterr().err
    assert not out.exists()
