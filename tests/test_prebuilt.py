"""Kernels compiled before a run: a rehearsal launches what the run does, and its kernels are found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fused_run
import pytest
import rehearsed
from kernel_proof import REPOSITORY
from native_tools import CMAKE
from ranks import Ranks

pytest.importorskip("triton.backends.nvidia")

import triton

from pythia_fast import doctor, prebuilt
from pythia_fast.cli import main
from pythia_fast.config import Config, to_toml
from pythia_fast.errors import InputError
from pythia_fast.kernels import checks

needs_interpreter = pytest.mark.skipif(
    not checks.INTERPRETED, reason="with a GPU no launch is interpreted, and recorded"
)
FP16 = ["--precision.compute", "fp16", "--precision.loss_scaling", "hysteresis"]
PAGES = {
    "fused": [*FP16, "--precision.gradients", "fp32"],
    "as published": [*FP16, "--precision.gradients", "fp16"],
    "odd sizes": [*FP16, "--data.seq_len", "17", "--model.vocab_size", "75"],
    "odd rows": [*FP16, "--train.micro_batch_size", "2", "--train.batch_size", "4", "--train.valid_rows", "7"],
}  # fmt: skip


def page(directory: Path, *flags: str) -> tuple[Config, Path]:
    config = fused_run.page(directory, *flags)
    path = directory / "resolved.toml"
    path.write_text(to_toml(config))
    return config, path


def rehearse(
    what: str, *paths: Path, repository: Path = REPOSITORY, **environment: str
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
         str(REPOSITORY / "tests/support/rehearsed.py"), what, *map(str, paths)],
        env=known | {"COPY": str(repository)} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def launches(*paths: Path, repository: Path = REPOSITORY) -> list[dict[int, set[str]]]:
    """Those of each page's rehearsal, by rank."""
    lines = rehearse("launches", *paths, repository=repository).stdout.splitlines()
    return [{int(rank): set(seen) for rank, seen in json.loads(line).items()} for line in lines]


def launches_of_a_run(config: Config, run: Path) -> set[str]:
    """Of a step under the interpreter, and of held-out rows."""
    with rehearsed.recorded() as seen:
        trainer = fused_run.fresh(config, run)
        trainer.train_step(fused_run.batch(trainer, 0))
        trainer.validate()
    return seen


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, set[str]]:
    """Launches of a run by its page, a page a form."""
    found = {}
    for flags in PAGES.values():
        config, path = page(tmp_path_factory.mktemp("page"), *flags)
        found[path] = launches_of_a_run(config, path.parent / "run")
    return found


@needs_interpreter
def test_a_rehearsal_launches_what_the_run_does(ran: dict[Path, set[str]]) -> None:
    """Types, constants, integers, alignment of every launch: what Triton's keys are made of."""
    assert all(len(seen) > 10 for seen in ran.values())
    assert launches(*ran) == [{0: seen} for seen in ran.values()]


FAULTS = {
    "an address without its offset": ("self._offset = int(tensor.storage_offset())", "self._offset = 0"),
    "one microbatch, which adds nothing": ("), 2 * config.parallel", "), 1 * config.parallel"),
    "nothing without gradients": ("if config.data.valid_prefix:", "if False:"),
    "whole microbatches of held-out rows": ("* c.train.micro_batch_size + rest", "* c.train.micro_batch_size"),
    "loss scaling skips the update": ("__bool__ = lambda self: True", "__bool__ = lambda self: False"),
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_rehearsal_is_found(
    fault: str, ran: dict[Path, set[str]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "pythia_fast", copy / "pythia_fast", symlinks=True)
    (copy / "kernels").symlink_to(REPOSITORY / "kernels")
    file = copy / "pythia_fast/rehearsal.py"
    old, new = FAULTS[fault]
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    assert launches(*ran, repository=copy) != [{0: seen} for seen in ran.values()]


# --- several processes ----------------------------------------------------------------------------

LAYOUTS = {  # page by what its processes share, and how many these are
    "tensor": ("--parallel.tensor 2", 2),
    "1f1b": ("--parallel.pipeline 2", 2),
    "zero-bubble": ("--parallel.pipeline 2 --parallel.schedule zero-bubble", 2),
    "optimizer": ("--parallel.data 2", 2),
    "full": ("--parallel.data 2 --parallel.shard full", 2),
    "three": ("--parallel.tensor 2 --parallel.pipeline 2 --parallel.sequence true", 4),
}
MORE = {
    "gpipe": ("--parallel.pipeline 2 --parallel.schedule gpipe", 2),
    "chunks": ("--parallel.pipeline 2 --parallel.schedule interleaved-1f1b --parallel.stages_per_rank 2"
               " --model.layers 4", 2),
    "none": ("--parallel.data 2 --parallel.shard none", 2),
    "sums in fp16": ("--parallel.data 2 --precision.gradients fp16 --precision.sum_ranks 2", 2),
    "each": ("--parallel.data 2 --parallel.tensor 2 --parallel.pipeline 2", 8),
}  # fmt: skip
EVERY = LAYOUTS | MORE
SMALL = [*FP16, "--model.layers", "2", "--train.batch_size", "4", "--train.valid_rows", "4"]


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def rehearsals(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[int, set[str]]]]:
    """A layout's page and what its ranks rehearse."""
    paths = [
        page(tmp_path_factory.mktemp("page"), *SMALL, *flags.split())[1]
        for flags, _ in EVERY.values()
    ]
    return dict(zip(EVERY, zip(paths, launches(*paths), strict=True), strict=True))


@needs_interpreter
@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.parallel) for more in MORE)]
)
def test_ranks_launch_what_some_of_them_rehearsed(
    layout: str, processes: Ranks, rehearsals: dict[str, tuple[Path, dict[int, set[str]]]]
) -> None:
    """Of real processes, on which collectives and schedules run: the same launches to the integer.

    A data-parallel process evaluates every second microbatch, a rehearsal both kinds.
    """
    path, seen = rehearsals[layout]
    ran = processes.call(EVERY[layout][1], rehearsed.launches_of_a_rank, str(path))
    every = set[str]().union(*ran)
    for rank, launched in seen.items():
        assert ran[rank] <= launched <= every
    assert rehearsed.kinds(seen) == set(map(rehearsed.kind, every))


WIDE = [*FP16, "--model.hidden", "256", "--model.heads", "8", "--train.batch_size", "16"]
MANY = {  # page by what its processes share, and how many of them rehearse
    "copies": ("--parallel.data 8", 5),
    "vocabulary": ("--parallel.tensor 8 --model.vocab_size 96 --parallel.sequence true", 2),
    "stages": ("--parallel.pipeline 4 --parallel.tensor 2 --parallel.data 2 --model.layers 6", 6),
    "chunks": ("--parallel.pipeline 2 --model.layers 7 --parallel.schedule interleaved-1f1b"
               " --parallel.stages_per_rank 3", 2),
}  # fmt: skip


def test_other_ranks_launch_nothing_else(tmp_path: Path) -> None:
    """Every single rank's rehearsal: no kernel more than those of the few. Three faults are found."""
    paths = []
    for layout, (flags, _) in MANY.items():
        (tmp_path / layout).mkdir()
        paths.append(page(tmp_path / layout, *WIDE, *flags.split())[1])
    found = [json.loads(line) for line in rehearse("all", *paths).stdout.splitlines()]
    assert [row[""] for row in found] == [0] * len(MANY)
    assert [row["ranks"] for row in found] == [ranks for _, ranks in MANY.values()]
    for fault in rehearsed.FAULTS:
        assert any(row[fault] for row in found), fault


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
    done = rehearse("cubins", path, repository=copy, **environment)
    assert done.stdout == "2\n"
    said = [line for line in done.stderr.splitlines() if prebuilt.VARIABLE in line]
    assert len(said) == 1 and "compiled now" in said[0]


FILE = "_gelu_fwd_kernel"
TORN: dict[str, Callable[[Path], object]] = {
    "no cubin": lambda folder: (folder / f"{FILE}.cubin").unlink(),
    "half a cubin": lambda folder: os.truncate(folder / f"{FILE}.cubin", 100),
    "half the words": lambda folder: os.truncate(folder / f"{FILE}.json", 20),
    "no seal": lambda folder: (folder / f"{FILE}.sha256").unlink(),
    "no text": lambda folder: (folder / f"{FILE}.sha256").write_bytes(b"\xff"),
    "a folder in its place": lambda folder: ((folder / f"{FILE}.json").unlink(), (folder / f"{FILE}.json").mkdir()),
}  # fmt: skip


def test_what_is_torn_is_not_there(built: tuple[Path, Path], tmp_path: Path) -> None:
    for what, tear in TORN.items():
        folder = tmp_path / what
        shutil.copytree(next(built[1].glob(f"*/{FILE}.json")).parent, folder)
        (folder / f".{FILE}.cubin.aB3x").write_bytes(b"of a copy under way")
        files = {f"{FILE}{kind}": str(folder / f"{FILE}{kind}") for kind in (".cubin", ".json")}
        assert prebuilt.sealed(folder, FILE) == files
        tear(folder)
        assert prebuilt.sealed(folder, FILE) is None, what


def test_doctor_counts_what_is_whole(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "kernels"
    shutil.copytree(built[1], own)
    monkeypatch.setenv(prebuilt.VARIABLE, str(own))
    (row,) = doctor._prebuilt()
    assert row["ok"] and re.search(r", (\d+) of \1 whole", row["found"])
    next(own.glob(f"*/*{prebuilt.SEAL}")).unlink()
    (row,) = doctor._prebuilt()
    assert not row["ok"] and "whole" in row["found"]
    (own / "manifest.json").write_text('{"triton": "3.0.0"}')
    assert "is of triton 3.0.0, not used" in doctor._prebuilt()[0]["found"]
    monkeypatch.setenv(prebuilt.VARIABLE, str(tmp_path))
    assert "no manifest.json" in doctor._prebuilt()[0]["found"]


def test_torn_kernels_are_compiled_again(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run, which says so, and by prebuild, which mends them."""
    path, directory = built
    own = tmp_path / "kernels"
    shutil.copytree(directory, own)
    (torn,) = own.glob(f"*/{FILE}.cubin")
    os.truncate(torn, 100)
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), prebuilt.VARIABLE: str(own)}
    done = rehearse("cubins", path, **environment)
    assert done.stdout == "1\n" and f"{FILE} is not in" in done.stderr
    assert main(["prebuild", str(path), "--gpu", "H100", "--out", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled"] == 1
    assert prebuilt.sealed(torn.parent, FILE) is not None


def test_a_cache_that_was_chosen_stays_behind(
    use: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Chosen(prebuilt.FileCacheManager):
        pass

    (tmp_path / "manifest.json").write_text(json.dumps({"triton": triton.__version__}))
    monkeypatch.setattr(triton.knobs.cache, "manager_class", Chosen)
    use(tmp_path)
    assert isinstance(prebuilt.PrebuiltCache("key").own, Chosen)


def test_building_again_keeps_what_is_there(
    built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, directory = built
    files = {f: f.stat().st_mtime_ns for f in directory.glob("*/*")}
    command = ["prebuild", str(path), "--gpu", "H100", "--out", str(directory), "--json"]
    assert main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["compiled"], row["kept"]) == (0, len(files) // 3)
    assert {f: f.stat().st_mtime_ns for f in directory.glob("*/*")} == files


@pytest.fixture
def use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """use_prebuilt(), twice, on a directory: (Triton's manager of caches, what was said).

    carried: it is the package's own. named: the environment's word.
    """
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    for name in ("source", "directory", "behind", "refused"):  # put back at the end
        monkeypatch.setattr(prebuilt.PrebuiltCache, name, getattr(prebuilt.PrebuiltCache, name))

    def call(directory: Path, carried: bool = False, named: str | None = None) -> tuple[Any, str]:
        monkeypatch.setattr(prebuilt, "CARRIED", directory if carried else directory / "none")
        if carried and named is None:
            monkeypatch.delenv(prebuilt.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(prebuilt.VARIABLE, str(directory) if named is None else named)
        prebuilt.use_prebuilt()
        prebuilt.use_prebuilt()
        return triton.knobs.cache.manager_class, capsys.readouterr().err

    return call


@pytest.mark.parametrize("carried", [False, True])
def test_of_another_triton_it_is_left_alone(
    use: Callable[..., Any], tmp_path: Path, carried: bool
) -> None:
    (tmp_path / "manifest.json").write_text('{"triton": "3.0.0"}')
    manager, said = use(tmp_path, carried)
    assert manager is None
    assert f"is of triton 3.0.0, this is {triton.__version__}" in said and said.count("\n") == 1
    assert ("the package's kernels" if carried else prebuilt.VARIABLE) in said


@pytest.mark.parametrize("manifest", [None, "no JSON", "[]", '{"version": 1}'])
def test_no_such_directory_is_bad_input(
    use: Callable[..., Any], tmp_path: Path, manifest: str | None
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"no manifest.json of `pythia-fast prebuild` in"):
        use(tmp_path)


def test_the_package_carries_its_own(use: Callable[..., Any], tmp_path: Path) -> None:
    """Used where the environment says nothing; another directory there, or nothing, is its word."""
    other = tmp_path / "other"
    other.mkdir()
    for where in (tmp_path, other):
        (where / "manifest.json").write_text(json.dumps({"triton": triton.__version__}))
    assert use(tmp_path, carried=True, named="") == (None, "")
    for named, used in ((None, tmp_path), (str(other), other)):
        triton.knobs.cache.manager_class = None
        assert use(tmp_path, carried=True, named=named) == (prebuilt.PrebuiltCache, "")
        assert prebuilt.PrebuiltCache.directory == used


def test_a_wheel_carries_a_directory(tmp_path: Path) -> None:
    """What scikit-build-core runs: configure and install; a wrong directory ends the build."""
    kernels = tmp_path / "kernels"
    (kernels / "KEY").mkdir(parents=True)
    (kernels / "KEY" / "_a_kernel.cubin").write_bytes(b"1")

    def cmake(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CMAKE, *map(str, arguments)], capture_output=True, text=True)

    configure = (
        "-S",
        REPOSITORY,
        "-B",
        tmp_path / "build",
        "-DSKBUILD=2",
        f"-DPYTHIA_PREBUILT={kernels}",
    )
    refused = cmake(*configure)
    assert refused.returncode and "PYTHIA_PREBUILT: no manifest.json" in refused.stderr
    (kernels / "manifest.json").write_text("{}")
    assert cmake(*configure).returncode == 0
    package = tmp_path / prebuilt.CARRIED.parent.name
    assert cmake("--install", tmp_path / "build", "--prefix", package).returncode == 0
    carried = package / prebuilt.CARRIED.name
    assert sorted(str(f.relative_to(carried)) for f in carried.rglob("*.*")) == [
        "KEY/_a_kernel.cubin",
        "manifest.json",
    ]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = page(tmp_path)
    out = tmp_path / "out"
    for flags, line in (
        (["--gpu", "V100"], "--gpu V100: not one of A100, H100, H200, B200"),
        (["--gpu", "H100", "--parallel.pipeline", "2"], "are fewer than the 2 pipeline stages"),
        (["--gpu", "H100", "--kernels.backend", "reference"], "'reference' launches no kernel"),
        (["--gpu", "H100", "--out", ""], "expected a path"),
    ):
        assert main(["prebuild", str(path), "--out", str(out), *flags]) == 2
        assert line in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    for manifest, line in (
        ('{"triton": "3.', "no manifest.json of `pythia-fast prebuild` in"),
        ('{"triton": "3.0.0"}', f"is of triton 3.0.0, this is {triton.__version__}: name another"),
    ):
        (out / "manifest.json").write_text(manifest)
        assert main(["prebuild", str(path), "--out", str(out), "--gpu", "H100"]) == 2
        assert line in capsys.readouterr().err
