"""NeoX checkpoints: read, written and read again, equal to the bit; and what bad ones say."""

from __future__ import annotations

import json
import os
import pickle
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
from neox_numpy import merged
from tiny_run import train_stopping_at

import pythia_fast.neox.layout as real_layout
import pythia_fast.neox.reader as reader
import pythia_fast.neox.writer as writer
import pythia_fast.train as train
from pythia_fast import checkpoint
from pythia_fast.cli import main
from pythia_fast.config import load
from pythia_fast.errors import InputError
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
    copies = {"optimizer.row_bias_copies": tensor, "optimizer.norm_copies": tensor}
    assert found.keys == {
        "model.layers": 2, "model.hidden": 32, "model.heads": 4, "model.vocab_size": 64,
        "data.seq_len": 16, **(copies if tensor > 1 else {}),
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
    directory = tmp_path_factory.mktemp("neox")
    page = tiny_run.make_page(directory)
    train_stopping_at(train, load(page, FLAGS), directory / "run", 7)
    train.train(load(page, FLAGS), directory / "run")
    return page, directory / "run"


FLAGS = ["--recipe", "pythia-v1", "--train.steps", "12", "--optimizer.row_bias_copies", "2",
         "--optimizer.norm_copies", "2"]  # fmt: skip


@pytest.mark.parametrize(("tensor", "ranks"), [(1, 1), (2, 3)])
def test_export_and_import_give_back_every_bit(
    tensor: int, ranks: int, run: tuple[Path, Path], tmp_path: Path
) -> None:
    source = checkpoint.directory(run[1], 7)
    root = writer.export(source, tmp_path / "out", tensor, ranks)
    assert root.name == "global_step7" and reader.find(tmp_path / "out") == root
    found = reader.read(root)
    saved = checkpoint.load_all(source, prefix="")
    assert found.tensors.keys() == saved.keys()
    assert all(torch.equal(found.tensors[name], saved[name]) for name in saved)
    manifest = checkpoint.read_manifest(source)
    assert (found.step, found.updates) == (7, manifest["updates"])
    assert found.loss_scale == manifest["loss_scale"]
    # and once more: the files of a second export are those of the first
    config = {**manifest["config"], **found.keys}
    extra = {"config": config, "updates": found.updates, "loss_scale": found.loss_scale}
    again = checkpoint.save(tmp_path / "again", 7, found.tensors, extra, permanent=True)
    second = writer.export(again, tmp_path / "second", tensor, ranks)
    assert contents(second) == contents(root)


def test_an_imported_checkpoint_is_exported_as_it_was(tmp_path: Path) -> None:
    """Weights and ZeRO files of another writer, read and written back: equal tensors, file by file."""
    root = write_checkpoint(tmp_path / "theirs", STATE, 7, tensor=2, data=3)
    path = reader.import_checkpoint(root, tmp_path / "run")
    manifest = checkpoint.read_manifest(path)
    config = {
        **manifest["config"],
        "precision.compute": "fp16",
        "precision.loss_scaling": "hysteresis",
    }
    extra = {"config": config, **{k: manifest[k] for k in ("updates", "loss_scale")}}
    fp16 = checkpoint.save(tmp_path / "fp16", 7, checkpoint.load_all(path, prefix=""), extra, True)
    ours = contents(writer.export(fp16, tmp_path / "ours", tensor=2, ranks=3))
    theirs = contents(root)
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        for key, value in content.items():
            if key.removeprefix(".").startswith(_NOT_KEPT) or key.endswith("inv_freq"):
                continue
            assert ours[name][key] == value, f"{name} {key}"


_NOT_KEPT = ("np_rng", "random_rng", "torch_rng", "rng_tracker", "global_samples", "lr_scheduler")


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
    assert json.loads(capsys.readouterr().out) == {"directory": out}
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
    fault: Callable[[Path], Any], message: str, whole: Path, tmp_path: Path
) -> None:
    root = tmp_path / "global_step7"
    shutil.copytree(whole, root)
    fault(root)
    (root,) = tmp_path.glob("global_step*")
    with pytest.raises(InputError, match=message) as caught:
        reader.import_checkpoint(root, tmp_path / "run")
    assert "\n" not in str(caught.value)
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
