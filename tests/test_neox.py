"""NeoX checkpoints: read, written and read again, equal to the bit; and what bad ones say."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from kernel_proof import Mutant, assert_killed, assert_sound
from neox_checkpoint import MODEL, layer_names, random_state, write_checkpoint
from neox_numpy import merged, shards
from tiny_run import train_stopping_at

import pythia_fast.neox.layout as real_layout
import pythia_fast.neox.reader as reader
import pythia_fast.neox.writer as writer
import pythia_fast.train as train
from pythia_fast import checkpoint
from pythia_fast.cli import main
from pythia_fast.config import flatten, load, resolve
from pythia_fast.errors import InputError
from pythia_fast.loss_scale import LossScale
from pythia_fast.neox.files import read_pt, read_yaml, write_pt

STATE = random_state(MODEL)


def assert_state(found: reader.NeoxCheckpoint, state: dict[str, dict[str, np.ndarray]]) -> None:
    wanted = {f"{kind}.{name}" for kind, arrays in state.items() for name in arrays}
    assert found.tensors.keys() == wanted
    for kind, arrays in state.items():
        for name, array in arrays.items():
            tensor = found.tensors[f"{kind}.{name}"]
            assert tensor.dtype == torch.float32
            assert np.array_equal(tensor.numpy(), array), f"{kind}.{name}"


@pytest.mark.parametrize(
    ("tensor", "data", "intervals"), [(1, 1, 1), (1, 4, 2), (2, 3, 1), (4, 2, 3)]
)
def test_a_checkpoint_is_read_whole(tensor: int, data: int, intervals: int, tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, STATE, 7, tensor, data, intervals)
    found = reader.read(root)
    assert_state(found, STATE)
    assert (found.step, found.updates) == (7, 5)
    assert found.loss_scale is not None
    assert found.loss_scale | {"scale": 8192.0, "iteration": 7, "chances": 1} == found.loss_scale
    assert found.keys == {
        "model.layers": 2, "model.hidden": 32, "model.heads": 4, "model.vocab_size": 64,
        "data.seq_len": 16, "train.batch_size": 8, "precision.compute": "fp16",
        "precision.loss_scaling": "hysteresis", "optimizer.step_offset": 1,
        "optimizer.row_bias_copies": tensor, "optimizer.norm_copies": tensor,
    }  # fmt: skip


def test_unequal_copies_are_summed_and_averaged(tmp_path: Path) -> None:
    """Row biases SUM, LayerNorms MEAN, the rest concatenated: from weights alone."""
    root = write_checkpoint(tmp_path, STATE, 3, tensor=2)
    for file in root.glob("zero_*"):
        file.unlink()
    parts: dict[str, list[np.ndarray]] = {}
    draw = np.random.default_rng(8)
    for rank in range(2):
        for index, leaf, name in layer_names(MODEL.layers):
            file = root / f"layer_{index:02d}-model_{rank:02d}-model_states.pt"
            layer = torch.load(file)
            layer[leaf] = torch.from_numpy(draw.normal(size=layer[leaf].shape)).half()
            torch.save(layer, file)
            parts.setdefault(name, []).append(layer[leaf].float().numpy())
    found = reader.read(root)
    assert found.updates is None and found.loss_scale is None
    for name, both in parts.items():
        np.testing.assert_array_equal(found.tensors[f"model.{name}"].numpy(), merged(name, both))


LAYOUT, READER = "pythia_fast/neox/layout.py", "pythia_fast/neox/reader.py"
MUTANTS = [
    Mutant("row biases averaged", LAYOUT, "return total if _is_row_bias(name) and not moments else total / len(parts)", "return total / len(parts)"),
    Mutant("LayerNorms summed", LAYOUT, "return total if _is_row_bias(name) and not moments else total / len(parts)", "return total"),
    Mutant("row weights cut along dim 0", LAYOUT, "return 1 if name", "return 0 if name"),
    Mutant("moments of row biases summed", LAYOUT, " and not moments else total", " else total"),
    Mutant("intervals after ranks", READER, "for interval in zip(*parts, strict=True) for part in interval", "for rank in parts for part in rank"),
    Mutant("module order by name", READER, "keys = [key for key, ours in named.items()", "keys = [key for key, ours in sorted(named.items())"),
    Mutant("skipped steps are updates", READER, 'counts["global_steps"] - counts["skipped_steps"]', 'counts["global_steps"]'),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_reader_are_killed(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_checkpoint(tmp_path, STATE, 7, tensor=2, data=3, intervals=2)

    def check(module: ModuleType) -> None:
        if mutant.file == LAYOUT:
            monkeypatch.setattr(reader, "merge", module.merge)
            monkeypatch.setattr(reader, "cut_along", module.cut_along)
        read = reader.read if mutant.file == LAYOUT else module.read
        found = read(root)
        assert_state(found, STATE)
        assert found.updates == 5

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


# --- export and round trips -----------------------------------------------------------------------


def contents(root: Path) -> dict[str, Any]:
    """file -> flattened content: tensors as (dtype, bytes), loss scalers as their attributes."""

    def flat(value: Any, at: str) -> dict[str, Any]:
        if isinstance(value, torch.Tensor):
            return {at: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
        if type(value).__name__ in ("LossScaler", "DynamicLossScaler"):
            value = vars(value)
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flat(value[key], f"{at}.{key}").items()}
        if isinstance(value, list):
            return {
                k: v for i, item in enumerate(value) for k, v in flat(item, f"{at}.{i}").items()
            }
        return {at: value}

    return {f.name: flat(read_pt(f), "") for f in sorted(root.glob("*.pt"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(page, run) of 12 fp16 steps, the published recipe."""
    return _train(tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="module")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, with the loss scaling of 14m and 31m."""
    return _train(tmp_path_factory.mktemp("dynamic"), "--precision.loss_scaling", "dynamic")


def _train(directory: Path, *flags: str) -> tuple[Path, Path]:
    page = tiny_run.make_page(directory)
    config = load(page, [*FLAGS, *flags])
    train_stopping_at(train, config, directory / "run", 7)
    train.train(config, directory / "run")
    return page, directory / "run"


FLAGS = ["--recipe", "pythia-v1", "--train.steps", "12", "--optimizer.row_bias_copies", "2",
         "--optimizer.norm_copies", "2"]  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "ranks", "kind"), [(1, 1, "run"), (2, 3, "run"), (2, 3, "dynamic_run")]
)
def test_export_and_import_give_back_every_bit(
    tensor: int, ranks: int, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = checkpoint.directory(request.getfixturevalue(kind)[1], 7)
    root = writer.export(source, tmp_path / "out", tensor, ranks)
    assert root.name == "global_step7" and reader.find(tmp_path / "out") == root
    found = reader.read(root)
    saved = checkpoint.load_all(source, prefix="")
    assert found.tensors.keys() == saved.keys()
    assert all(torch.equal(found.tensors[name], saved[name]) for name in saved)
    manifest = checkpoint.read_manifest(source)
    assert (found.step, found.updates) == (7, manifest["updates"])
    assert found.loss_scale == manifest["loss_scale"]
    config = checkpoint.config_of(source)
    assert found.keys == config.decisive  # copies of the run, not those of the files
    scaling = found.keys["precision.loss_scaling"]
    assert scaling == {"run": "hysteresis", "dynamic_run": "dynamic"}[kind]
    # and once more: the files of a second export are those of the first
    extra = {"config": manifest["config"], "updates": found.updates, "loss_scale": found.loss_scale}
    again = checkpoint.save(tmp_path / "again", 7, found.tensors, extra, permanent=True)
    second = writer.export(again, tmp_path / "second", tensor, ranks)
    assert contents(second) == contents(root)


WRITER, SCALER = "pythia_fast/neox/writer.py", "pythia_fast/neox/scaler.py"
EXPORT_MUTANTS = [
    Mutant("row biases whole on every rank", LAYOUT, "whole / ranks if", "whole if"),
    Mutant("moments of row biases divided", LAYOUT, "and not moments else whole", "else whole"),
    Mutant("row weights split along dim 0", LAYOUT, "whole.chunk(ranks, dim=dim)", "whole.chunk(ranks, dim=0)"),
    Mutant("parts of ranks overlap", WRITER, "slice(rank * size, (rank + 1) * size)", "slice(rank * size, (rank + 1) * size + 1)"),
    Mutant("parts in reverse", WRITER, "for rank in range(ranks):\n        part", "for rank in reversed(range(ranks)):\n        part"),
    Mutant("groups swapped", WRITER, "for d in (True, False)", "for d in (False, True)"),
    Mutant("no step was skipped", WRITER, '"skipped_steps": step - updates', '"skipped_steps": 0'),
    Mutant("global steps are updates", WRITER, '"global_steps": step,', '"global_steps": updates,'),
    Mutant("samples of updates", WRITER, "step * config.train.batch_size", "updates * config.train.batch_size"),
    Mutant("weights in fp32", WRITER, "DTYPES[config.precision.compute]", "torch.float32"),
    Mutant("skips in a row forgotten", WRITER, '.get("skipped_in_a_row", 0)', '.get("skipped", 0)'),
    Mutant("always delayed by two", SCALER, "delayed_shift=HYSTERESIS if hysteresis else 1", "delayed_shift=HYSTERESIS"),
    Mutant("always read with hysteresis", SCALER, "kind = _SHIFTS[shift]", 'kind = "hysteresis"'),
    Mutant("chances start anew", SCALER, "chances=chances if hysteresis else HYSTERESIS", "chances=HYSTERESIS"),
    Mutant("iterations start anew", SCALER, 'cur_iter=state["iteration"]', "cur_iter=99"),
]  # fmt: skip


def check_export(module: ModuleType, mutant: Mutant, directory: Path) -> None:
    """A state of random numbers, 5 updates in 7 steps: written by us, read by numpy and by us."""
    with pytest.MonkeyPatch.context() as patch:
        if mutant.file == LAYOUT:
            patch.setattr(writer, "split", module.split)
        if mutant.file == SCALER:
            patch.setattr(writer, "to_neox", module.to_neox)
            patch.setattr(reader, "from_neox", module.from_neox)
        export = module.export if mutant.file == WRITER else writer.export
        tensors = {
            f"{kind}.{name}": torch.from_numpy(array)
            for kind, arrays in STATE.items()
            for name, array in arrays.items()
        }
        for kind in ("hysteresis", "dynamic"):
            flags = {"recipe": "pythia-v1", "precision.loss_scaling": kind, "data.seq_len": 16,
                     "train.batch_size": 8, "train.micro_batch_size": 4}  # fmt: skip
            model = {f"model.{k}": v for k, v in dataclasses.asdict(MODEL).items()}
            model |= {"model.rope_table": "fp16"}
            config = resolve({**model, **flags})
            hysteresis = kind == "hysteresis"
            scale = LossScale(hysteresis, 512.0, 7, 6, 1 if hysteresis else 2, 2).state()
            extra = {"config": flatten(config), "updates": 5, "loss_scale": scale}
            saved = checkpoint.save(directory / kind, 7, tensors, extra, permanent=True)
            root = export(saved, directory / f"{kind}-out", tensor=2, ranks=3)
            found = reader.read(root)
            assert_state(found, STATE)
            assert (found.updates, found.loss_scale, found.keys) == (5, scale, config.decisive)
            state = read_pt(root / "mp_rank_01_model_states.pt")
            counts = [state[k] for k in ("iteration", "global_samples", "skipped_steps")]
            assert counts == [7, 56, 2]
            for index, leaf, name in layer_names(MODEL.layers):
                files = [f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for rank in (0, 1)]
                parts = [read_pt(root / file)[leaf] for file in files]
                wanted = shards(name, STATE["model"][name], 2)
                assert all(p.dtype == torch.float16 for p in parts)
                for part, array in zip(parts, wanted, strict=True):
                    assert np.array_equal(part.numpy(), array.astype(np.float16)), name


@pytest.mark.parametrize("mutant", EXPORT_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_export_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_sound([mutant], lambda module: check_export(module, mutant, tmp_path / "sound"))
    assert_killed(mutant, lambda module: check_export(module, mutant, tmp_path / "not"), tmp_path)


def test_an_imported_checkpoint_is_exported_as_it_was(tmp_path: Path) -> None:
    """Weights and ZeRO files of another writer, read and written back: equal tensors, file by file."""
    root = write_checkpoint(tmp_path / "theirs", STATE, 7, tensor=2, data=3)
    path = reader.import_checkpoint(root, tmp_path / "run")
    manifest = checkpoint.read_manifest(path)
    assert manifest["tokens"] == 7 * 8 * 16
    ours = contents(writer.export(path, tmp_path / "ours", tensor=2, ranks=3))
    theirs = contents(root)
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        for key, value in content.items():
            if key.removeprefix(".").startswith(_NOT_KEPT) or key.endswith("inv_freq"):
                continue
            assert ours[name][key] == value, f"{name} {key}"


_NOT_KEPT = ("np_rng", "random_rng", "torch_rng", "rng_tracker", "lr_scheduler")


def test_training_goes_on_from_an_imported_checkpoint_bit_for_bit(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    """export at step 7, import, train to 12: the weights and moments of the uninterrupted run."""
    page, straight = run
    writer.export(checkpoint.directory(straight, 7), tmp_path / "out", tensor=2, ranks=2)
    new = tmp_path / "run"
    assert main(["import", str(tmp_path / "out"), "--run", str(new), "--json"]) == 0
    assert checkpoint.steps(new) == [7]
    train_stopping_at(train, load(page, FLAGS), new, 9)  # a resume of its own on the way
    train.train(load(page, FLAGS), new)
    a, b = (tiny_run.result(r, 12) for r in (straight, new))
    assert a["tensors"] == b["tensors"]
    assert a["metrics"][7:] == b["metrics"]
    assert main(["data", "digest", str(page), *FLAGS, "--against", str(new)]) == 0
    plain = [{k: v for k, v in row.items() if k != "running"} for row in a["ledger"][7:]]
    assert plain == [{k: v for k, v in row.items() if k != "running"} for row in b["ledger"]]


PAGE_OF_THEIRS = """
[model]
layers = 2
hidden = 32
heads = 4
vocab_size = 64
[data]
prefix = "{data}/train"
seq_len = 16
[train]
steps = 10
batch_size = 8
micro_batch_size = 4
"""
FOREIGN = ["--recipe", "pythia-v1", "--optimizer.row_bias_copies", "2", "--optimizer.norm_copies", "2"]  # fmt: skip
CHANGES = [
    (["--recipe", "modern"], "optimizer.step_offset = 1, not 0"),
    (["--optimizer.row_bias_copies", "1"], "optimizer.row_bias_copies = 2, not 1"),
    (["--optimizer.norm_copies", "1"], "optimizer.norm_copies = 2, not 1"),
    (["--optimizer.step_offset", "0"], "optimizer.step_offset = 1, not 0"),
    (["--precision.loss_scaling", "dynamic"], "precision.loss_scaling = 'hysteresis', not 'dynamic'"),
    (["--train.batch_size", "16"], "train.batch_size = 8, not 16"),
    (["--data.seq_len", "8"], "data.seq_len = 16, not 8"),
    (["--optimizer.betas", "[0.9, 0.99]"], "optimizer.betas = (0.9, 0.95), not (0.9, 0.99)"),
    (["--optimizer.lr", "1e-2"], "optimizer.lr = 0.001, not 0.01"),
    (["--train.steps", "20"], "train.steps = 10, not 20"),
    (["--precision.compute", "bf16", "--precision.loss_scaling", "none", "--precision.gradients",
      "bf16", "--precision.gradient_sum", "bf16"], "precision.compute = 'fp16', not 'bf16'"),
]  # fmt: skip
YAML_OF_THEIRS = """{
  "num-layers": 2, "train-iters": 10, "min_lr": 1e-4,
  "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1.0e-8}},
  "fp16": {"enabled": true, "loss_scale": 0}, "gradient_clipping": 1.0, "seed": 1234
}"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an imported run, `run`, and of its page, `tiny.toml`."""
    directory = tmp_path_factory.mktemp("theirs")
    tiny_run.make_page(directory)
    (directory / "tiny.toml").write_text(PAGE_OF_THEIRS.format(data=directory))
    root = write_checkpoint(directory, STATE, 7, tensor=2, data=2)
    (directory / "run.yml").write_text(YAML_OF_THEIRS)
    reader.import_checkpoint(root, directory / "run", directory / "run.yml")
    return directory


def check_changes(module: ModuleType, theirs: Path, directory: Path) -> None:
    """Each change of what the checkpoint says is refused by both values, and nothing trained."""
    for number, (flags, message) in enumerate(CHANGES):
        run = directory / str(number)
        shutil.copytree(theirs / "run", run)
        config = load(theirs / "tiny.toml", [*FOREIGN, *flags])
        said = re.escape(f"was trained with {message}") + r"(, and \d more keys?)?: set it"
        with pytest.raises(InputError, match=said):
            module.train(config, run)
        assert checkpoint.steps(run) == [7]


def test_an_imported_run_goes_on_under_its_own_recipe_alone(theirs: Path, tmp_path: Path) -> None:
    check_changes(train, theirs, tmp_path)
    shutil.copytree(theirs / "run", tmp_path / "run")
    row = train.train(load(theirs / "tiny.toml", FOREIGN), tmp_path / "run")
    assert row["step"] == 10 and row["skipped"] == 2  # those before the import


TRAIN = "pythia_fast/train.py"
RECIPE_MUTANTS = [
    Mutant("an import fixes the model alone", TRAIN, '| set(manifest.get("known", ()))', ""),
    Mutant("an import fixes nothing", TRAIN, "(key in fixed or not imported)", "not imported"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", RECIPE_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_imported_recipe_are_killed(
    mutant: Mutant, theirs: Path, tmp_path: Path
) -> None:
    assert_sound([mutant], lambda module: check_changes(module, theirs, tmp_path / "sound"))
    assert_killed(mutant, lambda module: check_changes(module, theirs, tmp_path / "not"), tmp_path)


def test_a_yaml_that_contradicts_the_files_is_named(tmp_path: Path) -> None:
    root, page = write_checkpoint(tmp_path, STATE, 7, tensor=2, data=2), tmp_path / "run.yml"
    for text, message in (
        ('{"train_batch_size": 16}', r"train\.batch_size = 8, but .*run\.yml says 16"),
        ('{"fp16": {"enabled": true, "type": "bfloat16"}}', r"compute = 'fp16', but .*yml says bf16"),
        ('{"model-parallel-size": 4}', r"run\.yml: model_parallel_size = 4, but the files hold 2"),
        ('{"num-attention-heads": 8}', r"run\.yml: num_attention_heads = 8, but .*pt says 4"),
        ('{"min_lr": "low"}', r"optimizer\.min_lr = 'low': expected a number"),
    ):  # fmt: skip
        page.write_text(text)
        with pytest.raises(InputError, match=message):
            reader.import_checkpoint(root, tmp_path / "run", page)


def test_a_checkpoint_without_optimizer_state_is_step_0(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, STATE, 143000, tensor=1)
    for file in root.glob("zero_*"):
        file.unlink()
    path = reader.import_checkpoint(root, tmp_path / "run")
    assert path.name == "step0"
    assert checkpoint.load_all(path)["embed_out.weight"].shape == (64, 32)
    assert writer.export(path, tmp_path / "out") == tmp_path / "out" / "global_step0"
    assert not list((tmp_path / "out").rglob("zero_*"))


def test_export_by_command(run: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    step = str(checkpoint.directory(run[1], 12))
    out = str(tmp_path / "out")
    assert main(["export", step, "--out", out, "--format", "neox", "--tensor", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "directory": out, "format": "neox", "dtype": "fp16",
    }  # fmt: skip
    assert (tmp_path / "out" / "latest").read_text() == "global_step12\n"
    for flags, message in (
        (["--tensor", "3"], "--tensor 3 does not divide model.heads = 2"),
        (["--tensor", "0"], "--tensor 0"),
        (["--ranks", "0"], "--ranks 0: at least 1"),
    ):
        new = str(tmp_path / "new")
        assert main(["export", step, "--out", new, "--format", "neox", *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert main(["export", step, "--out", out, "--format", "neox"]) == 2
    assert "exists already" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


def _edit(root: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = read_pt(root / name)
    change(content)
    (root / name).unlink()
    write_pt(root / name, content)


def _drop(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/pythia-fast-was-fooled",)


def _weight_of_another_step(root: Path) -> None:
    _edit(root, "layer_03-model_00-model_states.pt",
          lambda c: c["attention.dense.weight"].mul_(1.01))  # fmt: skip


def _truncate(root: Path) -> None:
    file = root / "layer_02-model_01-model_states.pt"
    file.write_bytes(file.read_bytes()[:-200])


def _shards(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """`change` done to the optimizer state of every rank."""

    def fault(root: Path) -> None:
        for file in root.glob("zero_*.pt"):
            _edit(root, file.name, lambda c: change(c["optimizer_state_dict"]))

    return fault


def _scaler(**attributes: Any) -> Callable[[Path], None]:
    return _shards(lambda state: vars(state["loss_scaler"]).update(attributes))


def _moment(kind: str, value: float) -> Callable[[Path], None]:
    def fault(content: Any) -> None:
        content["optimizer_state_dict"]["base_optimizer_state"][0][0][kind][3] = value

    return lambda root: _edit(root, "zero_pp_rank_1_mp_rank_00_optim_states.pt", fault)


def _ranks(**keys: Any) -> Callable[[Path], None]:
    """Keys of mp_rank_*_model_states.pt on every tensor rank."""

    def fault(root: Path) -> None:
        for file in root.glob("mp_rank_*.pt"):
            _edit(root, file.name, lambda c: c.update(keys))

    return fault


FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("layer missing", _drop("layer_03-model_01-model_states.pt"), r"layer_03-model_01.* is missing"),
    ("head missing", _drop("layer_06-model_00-model_states.pt"), r"layer_06-model_00.* is missing"),
    ("head missing on all ranks", lambda root: [_drop(f"layer_06-model_0{t}-model_states.pt")(root) for t in (0, 1)], r"files are missing: pipeline layers \[0, 2, 3, 5\] are here"),
    ("ranks of two steps", lambda root: _edit(root, "mp_rank_01_model_states.pt", lambda c: c.update(global_steps=8)), r"global_steps = 7, 8"),
    ("metadata missing", _drop("mp_rank_01_model_states.pt"), r"mp_rank_01_model_states\.pt is missing"),
    ("shard missing", _drop("zero_pp_rank_1_mp_rank_00_optim_states.pt"), r"zero_pp_rank_1_mp_rank_00.* is missing"),
    ("last shard missing", _drop("zero_pp_rank_2_mp_rank_01_optim_states.pt"), r"of 3 data-parallel ranks, 2 of whose files"),
    ("truncated", _truncate, r"layer_02-model_01.* cannot be read"),
    ("another step's weights", _weight_of_another_step, r"attention\.dense\.weight of layer 3 .* another step"),
    ("out of place", lambda root: root.rename(root.with_name("global_step9")), r"is of step 7: the checkpoint is out of its place"),
    ("heads not named", lambda root: [_edit(root, f"mp_rank_0{t}_model_states.pt", lambda c: c.pop("args")) for t in (0, 1)], "how many attention heads"),
    ("args of another model", lambda root: _edit(root, "mp_rank_00_model_states.pt", lambda c: c["args"].update(num_layers=3)), r"num_layers = 3, but the files hold 2"),
    ("names of later versions", lambda root: _edit(root, "layer_02-model_00-model_states.pt", _renamed), r"is missing; GPT-NeoX after v1\.0 renamed it"),
    ("unknown tensor", lambda root: _edit(root, "layer_00-model_00-model_states.pt", lambda c: c.update(extra=torch.ones(1))), r"extra is not part of this model"),
    ("wrong shape", lambda root: _edit(root, "layer_05-model_01-model_states.pt", lambda c: c.update({"norm.bias": torch.ones(31).half()})), r"norm\.bias has shape \[31\], expected \[32\]"),
    ("stage 2", lambda root: _edit(root, "zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda c: c["optimizer_state_dict"].update(zero_stage=2)), "not the optimizer state of ZeRO stage 1"),
    ("short shard", lambda root: _edit(root, "zero_pp_rank_0_mp_rank_00_optim_states.pt", _shortened), r"hold \d+ values of model where the weights have \d+"),
    ("no moments", lambda root: _edit(root, "zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda c: c["optimizer_state_dict"].update(base_optimizer_state=[])), "no exp_avg of parameter group 0"),
    ("a pickle with code", lambda root: torch.save({"x": Evil()}, root / "layer_02-model_00-model_states.pt"), r"layer_02-model_00.* cannot be read: posix\.system is not allowed in it"),
    ("a bare pickle", lambda root: (root / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Evil(), 2)), r"mp_rank_00.* cannot be read: (posix|os)\.system is not allowed"),
    ("a list", lambda root: torch.save([1], root / "mp_rank_00_model_states.pt"), "is not a state dict"),
    ("int embeddings", lambda root: _edit(root, "layer_00-model_00-model_states.pt", lambda c: c.update({"word_embeddings.weight": torch.ones(32, 32).int()})), r"layer_00.*word_embeddings\.weight is int32 \[32, 32\]"),
    ("a scalar for embeddings", lambda root: _edit(root, "layer_00-model_00-model_states.pt", lambda c: c.update({"word_embeddings.weight": torch.ones(()).half()})), r"word_embeddings\.weight is float16 \[\]"),
    ("NaN weights", lambda root: _edit(root, "layer_05-model_01-model_states.pt", lambda c: c["norm.bias"].fill_(float("nan"))), r"layer_05-model_01.*norm\.bias holds values that are not finite"),
    ("NaN moments", _moment("exp_avg", float("nan")), r"zero_pp_rank_1_mp_rank_00.*exp_avg of parameter group 0 is not finite"),
    ("negative squares", _moment("exp_avg_sq", -1.0), r"exp_avg_sq of parameter group 0 is not finite or negative"),
    ("no scaler", _shards(lambda s: s.pop("loss_scaler")), "loss_scaler is missing"),
    ("a dict for a scaler", _shards(lambda s: s.update(loss_scaler={"cur_scale": 1.0})), "loss_scaler is missing"),
    *((f"cur_scale {v!r}", _scaler(cur_scale=v), rf"cur_scale of the loss scaler is {re.escape(repr(v))}") for v in ("abc", [1.0], float("nan"), float("inf"), 0, 0.5, -4096.0, True, None)),
    *((f"cur_hysteresis {v!r}", _scaler(cur_hysteresis=v), rf"cur_hysteresis of the loss scaler is {v}, expected a whole number in \[1, 2\]") for v in (0, 3, 1.0)),
    ("a window of 500", _scaler(scale_window=500), r"scale_window of the loss scaler is 500, expected 1000"),
    ("delayed by 3", _scaler(delayed_shift=3), r"delayed_shift of the loss scaler is 3, expected 1 or 2"),
    ("consecutive", _scaler(consecutive_hysteresis=True), r"consecutive_hysteresis of the loss scaler is True"),
    ("overflow to come", _scaler(last_overflow_iter=7), r"last_overflow_iter of the loss scaler is 7, expected a whole number in \[-1, 6\]"),
    ("negative iterations", _scaler(cur_iter=-1), "cur_iter of the loss scaler is -1"),
    ("scalers of two scales", lambda root: _edit(root, "zero_pp_rank_1_mp_rank_01_optim_states.pt", lambda c: vars(c["optimizer_state_dict"]["loss_scaler"]).update(cur_scale=4.0)), "loss scalers of its ZeRO files differ"),
    ("a constant scale in fp16", _shards(lambda s: vars(s["loss_scaler"]).pop("cur_iter")), "a constant loss scale in fp16 is not there"),
    ("fifty skipped", _ranks(skipped_in_a_row=50), "skipped_in_a_row of the loss scaler is 50"),
    ("more skipped than done", _ranks(skipped_steps=8), "more skipped_steps than global_steps"),
    ("iteration as text", _ranks(iteration="7"), r"mp_rank_\*_model_states\.pt: iteration = '7', '7'"),
    ("foreign keys as ours", _ranks(pythia_fast={"model.colour": 1}), r"unknown key model\.colour"),
    ("ours is no table", _ranks(pythia_fast=[1]), "pythia_fast is not a table of keys"),
    ("no counts", lambda root: _edit(root, "mp_rank_00_model_states.pt", lambda c: c.update(skipped_steps="x")), "skipped_steps = 'x'"),
]  # fmt: skip


def _renamed(content: dict[str, Any]) -> None:
    for old, new in (("dense_h_to_4h", "linear1"), ("dense_4h_to_h", "linear2")):
        for leaf in ("weight", "bias"):
            content[f"mlp.{new}.{leaf}"] = content.pop(f"mlp.{old}.{leaf}")


def _shortened(content: dict[str, Any]) -> None:
    groups = content["optimizer_state_dict"]["local_sub_partitions_of_fp32_groups"]
    groups[0][0] = groups[0][0][:-5].clone()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), STATE, 7, tensor=2, data=3)


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_wrong_and_partial_directories_are_named(
    fault: Callable[[Path], Any], message: str, whole: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = tmp_path / "global_step7"
    shutil.copytree(whole, root)
    fault(root)
    (root,) = tmp_path.glob("global_step*")
    assert main(["import", str(root), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert checkpoint.steps(tmp_path / "run") == []
    assert not Path("/tmp/pythia-fast-was-fooled").exists()


def test_an_empty_directory_and_a_false_latest_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a NeoX checkpoint"):
        reader.read(tmp_path)
    (tmp_path / "latest").write_text("../global_step1")
    with pytest.raises(
        InputError, match=r"latest: '\.\./global_step1' is not a directory beside it"
    ):
        reader.find(tmp_path)
    (tmp_path / "latest").write_bytes(b"global_step\xff\n")
    assert main(["import", str(tmp_path), "--run", str(tmp_path / "run")]) == 2
    assert real_layout.names(0)[4, "final_linear.weight"] == "embed_out.weight"


SWAPPED = """{
   # model settings
   "num-layers": 40,
   "hidden-size": 5120,
   "num-attention-heads": 36,
   "max-position-embeddings": 2048,
}"""


def test_a_yaml_with_layers_and_heads_swapped_is_named(tmp_path: Path) -> None:
    page = tmp_path / "12b-deduped.yml"
    page.write_text(SWAPPED)
    with pytest.raises(InputError, match=r"= 36 does not divide hidden-size = 5120; num-layers = 40 does: the two are swapped"):  # fmt: skip
        read_yaml(page)
    page.write_text(SWAPPED.replace("40,", "36,").replace(': 36,\n   "max', ': 40,\n   "max'))
    assert read_yaml(page)["num_attention_heads"] == 40
    page.write_text('{\n "a": 1\n "b": 2\n}')  # the comma that 12b.yml lacks
    with pytest.raises(InputError, match=r"12b-deduped\.yml is not YAML: .*line 3"):
        read_yaml(page)


def test_heads_come_from_the_yaml_where_no_file_names_them(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "global_step7"
    shutil.copytree(whole, root)
    for rank in (0, 1):
        _edit(root, f"mp_rank_0{rank}_model_states.pt", lambda c: c.pop("args"))
    page = tmp_path / "run.yml"
    text = '{"num-layers": 2, "hidden-size": 32, "num-attention-heads": 4, "rotary_pct": 0.5}'
    page.write_text(text)
    assert reader.read(root, page).keys["model.rotary_pct"] == 0.5
    page.write_text(text.replace('"num-layers": 2', '"num-layers": 4'))
    with pytest.raises(InputError, match=r"run\.yml: num_layers = 4, but the files hold 2"):
        reader.read(root, page)
    (root / "configs").mkdir()
    (root / "configs" / "run.yml").write_text(text)
    assert reader.read(root).keys["model.heads"] == 4
