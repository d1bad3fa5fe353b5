"""Checkpoints: bit-exact, never torn, never silently wrong, never executing what they load."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoint_faults import Calls, contents, hidden, holds_exactly, save
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import REPOSITORY, Mutant, assert_killed
from torch import Tensor

from pythia_fast import checkpoint, storage
from pythia_fast.errors import CheckError, InputError

# The 154 revisions of every published model, as the Hub lists them.
PUBLISHED = """
0 1 2 4 8 16 32 64 128 256 512
1000 2000 3000 4000 5000 6000 7000 8000 9000 10000 11000 12000 13000 14000 15000 16000 17000 18000
19000 20000 21000 22000 23000 24000 25000 26000 27000 28000 29000 30000 31000 32000 33000 34000
35000 36000 37000 38000 39000 40000 41000 42000 43000 44000 45000 46000 47000 48000 49000 50000
51000 52000 53000 54000 55000 56000 57000 58000 59000 60000 61000 62000 63000 64000 65000 66000
67000 68000 69000 70000 71000 72000 73000 74000 75000 76000 77000 78000 79000 80000 81000 82000
83000 84000 85000 86000 87000 88000 89000 90000 91000 92000 93000 94000 95000 96000 97000 98000
99000 100000 101000 102000 103000 104000 105000 106000 107000 108000 109000 110000 111000 112000
113000 114000 115000 116000 117000 118000 119000 120000 121000 122000 123000 124000 125000 126000
127000 128000 129000 130000 131000 132000 133000 134000 135000 136000 137000 138000 139000 140000
141000 142000 143000
"""


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """A manifest that fits the files as they are now: what an attacker would write."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    files = [f for f in path.iterdir() if f.name != "manifest.json"]
    manifest["files"] = {
        f.name: {
            "bytes": f.stat().st_size,
            "sha256": storage.hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in files
    }
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(manifest))


# --- the schedule ---------------------------------------------------------------------------------


def test_pythia_schedule_is_the_published_one() -> None:
    listed = [int(word) for word in PUBLISHED.split()]
    assert len(listed) == 154
    assert checkpoint.schedule("pythia", 143000) == listed
    assert list(checkpoint.PYTHIA_STEPS) == listed


def test_schedule_ends_with_the_last_step() -> None:
    assert checkpoint.schedule("pythia", 700) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 700]
    assert checkpoint.schedule("pythia", 512)[-2:] == [256, 512]
    assert checkpoint.schedule([30, 3, 3], 10) == [3, 10]
    assert checkpoint.schedule([], 10) == [10]


# --- round trip -----------------------------------------------------------------------------------


@pytest.fixture
def several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BYTES_PER_FILE", 2048)
    monkeypatch.setattr(storage, "_MAX_FILES", 2)


def odd_tensors() -> dict[str, Tensor]:
    flat = torch.randn(1000)
    return {
        "model.view": flat[10:910].view(30, 30),
        "model.transposed": torch.randn(5, 7).t(),
        "model.empty": torch.zeros(0, 4),
        "model.nan": torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32),
        "model.half": torch.randn(33).half(),
        "exp_avg.bf16": torch.randn(3, 3, 3).bfloat16(),
        "steps": torch.tensor(12, dtype=torch.int64),
    }


@pytest.mark.parametrize("threads", [False, True])
def test_round_trip_is_bit_exact(
    tmp_path: Path, threads: bool, request: pytest.FixtureRequest
) -> None:
    if threads:
        request.getfixturevalue("several_files")
    tensors = odd_tensors()
    extra = {"tokens": 2**53 - 1, "config": {"model.norm_eps": 1e-05, "data.prefix": "é/ü"}}
    path = checkpoint.save(tmp_path, 12, tensors, extra, permanent=True)
    assert path == tmp_path / "checkpoints" / "step12"
    into = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    manifest = checkpoint.load(path, into)
    for name, tensor in tensors.items():
        assert bits(into[name]) == bits(tensor), name
        assert into[name].data_ptr() == addresses[name]
    assert {key: manifest[key] for key in extra} == extra
    assert manifest["step"] == 12 and manifest["torch"] == torch.__version__
    shards = {p.name for p in path.glob("*.distcp")}
    assert len(shards) == (2 if threads else 1)
    assert manifest["files"].keys() == shards | {".metadata"}
    loaded = checkpoint.load_all(path)
    assert loaded.keys() == {n.removeprefix("model.") for n in tensors if n.startswith("model.")}
    assert all(bits(loaded[name]) == bits(tensors[f"model.{name}"]) for name in loaded)
    assert checkpoint.load_all(path, "steps")[""].item() == 12


def test_plain_dcp_reads_it(tmp_path: Path) -> None:
    tensors = contents(1)
    path = save(tmp_path, 1)
    into = {name: torch.zeros_like(t) for name, t in tensors.items()}
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.load(into, checkpoint_id=path, no_dist=True)
    assert all(bits(into[name]) == bits(tensors[name]) for name in tensors)


def test_equal_states_make_equal_files_without_a_trace_of_the_machine(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", 3), save(tmp_path / "two", 3)
    for file in one.iterdir():
        data = file.read_bytes()
        assert data == (two / file.name).read_bytes(), file.name
        assert str(tmp_path).encode() not in data and os.uname().nodename.encode() not in data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.b"), "holds the tensor model.b, which is not expected"),
        (lambda t: t.update(new=torch.zeros(1)), "does not hold the tensor new"),
        (
            lambda t: t.update({"model.b": torch.zeros(8).bfloat16()}),
            r"model.b is bfloat16 \[7\], expected bfloat16 \[8\]",
        ),
        (
            lambda t: t.update({"model.b": torch.zeros(7)}),
            r"model.b is bfloat16 \[7\], expected float32 \[7\]",
        ),
    ],
)
def test_load_names_the_first_tensor_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = save(tmp_path, 1)
    into = {name: torch.zeros_like(t) for name, t in contents(1).items()}
    change(into)
    with pytest.raises(InputError, match=message):
        checkpoint.load(path, into)
    assert not any(t.any() for t in into.values()), "nothing is loaded in part"


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "checkpoints" / "step7", {})
    path = save(tmp_path, 1)
    with pytest.raises(InputError, match="exists already"):
        save(tmp_path, 1)
    with pytest.raises(InputError, match="no tensor momentum"):
        checkpoint.load_all(path, "momentum.")
    with pytest.raises(ValueError, match="step is a key"):
        checkpoint.save(tmp_path, 2, contents(2), {"step": 3}, False)
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, 2, contents(2), {"loss": float("nan")}, False)
    assert checkpoint.steps(tmp_path) == [1] and not hidden(tmp_path)


# --- damage ---------------------------------------------------------------------------------------


def flips(path: Path, count: int) -> list[tuple[Path, int]]:
    """(file, bit) of `count` flips in every file: the first and last bytes, the rest drawn."""
    draw = random.Random(1)
    chosen = []
    for file in sorted(path.iterdir()):
        n = 8 * file.stat().st_size
        chosen += [(file, bit) for bit in (0, 7, n - 8, n - 1)]
        chosen += [(file, draw.randrange(n)) for _ in range(count)]
    return chosen


def damage_is_found(module: ModuleType, path: Path, count: int) -> None:
    found = 0
    chosen = flips(path, count)
    for file, bit in chosen:
        data = bytearray(file.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        intact = file.read_bytes()
        file.write_bytes(data)
        try:
            module.verify(path)
        except (CheckError, InputError) as error:
            assert file.name in str(error)
            found += 1
        file.write_bytes(intact)
    assert found == len(chosen)
    module.verify(path)


def test_every_bit_flip_is_found(tmp_path: Path, several_files: None) -> None:
    damage_is_found(checkpoint, save(tmp_path, 1), 100)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (
            Mutant(
                "sha256 not compared",
                "pythia_fast/checkpoint.py",
                'if digest != files[name]["sha256"]:',
                "if False:",
            ),
            damage_is_found,
        ),
        (
            Mutant(
                "the manifest's own digest not compared",
                "pythia_fast/checkpoint.py",
                "_manifest_bytes(manifest) == data",
                "True",
            ),
            damage_is_found,
        ),
    ],
)
def test_damage_mutants(
    tmp_path: Path, mutant: Mutant, check: Callable[[ModuleType, Path, int], None]
) -> None:
    path = save(tmp_path / "run", 1)
    assert_killed(mutant, lambda module: check(module, path, 30), tmp_path)


def truncated(path: Path, _: Path) -> None:
    file = path / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)


def appended(path: Path, _: Path) -> None:
    with (path / "__0_0.distcp").open("ab") as f:
        f.write(b"\0")


def swapped(path: Path, _: Path) -> None:
    one, two = path / "__0_0.distcp", path / "__0_1.distcp"
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def stale_manifest(path: Path, other: Path) -> None:
    shutil.copy(other / "manifest.json", path)


def foreign_shard(path: Path, other: Path) -> None:
    shutil.copy(other / "__0_0.distcp", path)


def missing_file(path: Path, _: Path) -> None:
    (path / "__0_0.distcp").unlink()


def extra_file(path: Path, _: Path) -> None:
    (path / "__1_0.distcp").write_bytes(b"")


def other_step(path: Path, other: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(other, path)


def empty_manifest(path: Path, _: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def no_metadata(path: Path, _: Path) -> None:
    (path / ".metadata").unlink()
    rewrite_manifest(path)


def escaping_name(path: Path, _: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../step2/__0_0.distcp"] = manifest["files"]["__0_0.distcp"]
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "__0_0.distcp: .* bytes where"),
        (appended, "__0_0.distcp: .* bytes where"),
        (swapped, "__0_[01].distcp"),
        (stale_manifest, "manifest.json is of step 2"),
        (foreign_shard, "__0_0.distcp is damaged"),
        (missing_file, "__0_0.distcp is missing"),
        (extra_file, "__1_0.distcp is not in the manifest"),
        (other_step, "is of step 2: the checkpoint is out of its place"),
        (empty_manifest, "manifest.json is damaged"),
        (no_metadata, ".metadata is not in the manifest"),
        (escaping_name, "is not the name of a file in this directory"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, several_files: None, damage: Callable[[Path, Path], None], message: str
) -> None:
    path, other = save(tmp_path, 1), save(tmp_path, 2)
    damage(path, other)
    into = {name: torch.zeros_like(t) for name, t in contents(1).items()}
    kind = checkpoint.Incomplete if damage is missing_file else CheckError
    with pytest.raises(kind, match=message):
        checkpoint.load(path, into)
    assert not any(t.any() for t in into.values())
    assert holds_exactly(tmp_path, 2)


# --- hostile pickles ------------------------------------------------------------------------------

EXECUTED: list[str] = []


class Calling:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile_pickles(sentinel: Path) -> dict[str, bytes]:
    """Payloads that create `sentinel` when an unlimited unpickler reads them."""
    import builtins
    import functools
    import operator
    import runpy

    shell, python = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()"
    script = sentinel.with_suffix(".py")
    script.write_text(python)
    eval_call = f"(S{python!r}\n".encode()
    dotted = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93"  # torch.os is the module os
    return {
        "os.system": pickle.dumps(Calling(os.system, shell)),
        "builtins.eval": pickle.dumps(Calling(builtins.eval, python)),
        "builtins.exec": pickle.dumps(Calling(builtins.exec, python)),
        "subprocess": pickle.dumps(Calling(subprocess.call, ["touch", str(sentinel)])),
        "runpy": pickle.dumps(Calling(runpy.run_path, str(script))),
        "partial": pickle.dumps(Calling(functools.partial(os.system, shell))),
        "methodcaller": pickle.dumps(Calling(operator.methodcaller("touch"), sentinel)),
        "in a list": pickle.dumps([1, {"a": Calling(os.system, shell)}]),
        "protocol 0": pickle.dumps(Calling(os.system, shell), protocol=0),
        "INST": eval_call + b"ibuiltins\neval\n.",
        "OBJ": b"(cbuiltins\neval\n" + eval_call[1:] + b"o.",
        "dotted name": dotted + b"\x8c" + bytes([len(shell)]) + shell.encode() + b"\x85R.",
        "after the metadata": pickle.dumps((torch.Size([1]), Calling(os.system, shell))),
    }


def polluting_pickles() -> dict[str, bytes]:
    """Payloads of allowed names only, that would change the program or have no business here."""
    module = b"torch.distributed.checkpoint.metadata"
    cls = b"c" + module + b"\nMetadata\n"
    return {
        "BUILD on a class": cls + b"(N}S'version'\nS'stolen'\nstb.",
        "BUILD on a function": b"ctorch.serialization\n_get_layout\n(N}S'stolen'\nI1\nstb.",
        "BUILD on a member": b"c%b\n_MEM_FORMAT_ENCODING\n(I0\ntR}S'_name_'\nS'evil'\nsb." % module,
        "a class for an object": cls + b".",
        "a list": pickle.dumps([1, 2]),
        "a layout": b"ctorch.serialization\n_get_layout\n(S'os.system'\ntR.",
        "a persistent id": b"Ppayload\n.",
        "a submodule": b"ctorch\nload\n.",
        "truncated": cls + b"(",
        "nothing": b"",
    }


def refuses(module: ModuleType, path: Path, payload: bytes) -> None:
    (path / ".metadata").write_bytes(payload)
    files = {".metadata": {"bytes": len(payload)}, "__0_0.distcp": {"bytes": 1 << 20}}
    try:
        module.read_metadata(path, files)
    except CheckError as error:
        assert ".metadata is refused" in str(error)
    else:
        raise AssertionError("read")


def test_hostile_metadata_is_refused_before_it_runs(tmp_path: Path) -> None:
    path, sentinel = save(tmp_path / "run", 1), tmp_path / "executed"
    for name, payload in hostile_pickles(sentinel).items():
        pickle.loads(payload)
        assert sentinel.exists(), f"{name}: the payload itself does nothing"
        sentinel.unlink()
        refuses(storage, path, payload)
        rewrite_manifest(path)  # the forger made a manifest that fits
        with pytest.raises(CheckError, match="metadata is refused"):
            checkpoint.load_all(path)
        assert not sentinel.exists(), name


@pytest.mark.parametrize("name", polluting_pickles())
def test_metadata_can_not_change_the_program(tmp_path: Path, name: str) -> None:
    refuses(storage, save(tmp_path, 1), polluting_pickles()[name])
    assert storage.dcp.Metadata.version is None
    assert not hasattr(torch.serialization._get_layout, "stolen")
    assert storage.dcp_metadata._MEM_FORMAT_ENCODING(0).name != "evil"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            'raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")',
            "return super().find_class(module, name)",
        ),
        (
            '("torch", "Size"): torch.Size,',
            '("torch", "Size"): torch.Size, ("builtins", "eval"): eval,',
        ),
    ],
)
def test_unpickler_mutants(tmp_path: Path, old: str, new: str) -> None:
    path, sentinel = save(tmp_path / "run", 1), tmp_path / "executed"

    def check(module: ModuleType) -> None:
        for payload in hostile_pickles(sentinel).values():
            refuses(module, path, payload)
            assert not sentinel.exists()

    assert_killed(Mutant(new, "pythia_fast/storage.py", old, new), check, tmp_path)


def test_build_mutant(tmp_path: Path) -> None:
    """BUILD happens before any refusal: only the member's name tells."""
    path, member = save(tmp_path / "run", 1), storage.dcp_metadata._MEM_FORMAT_ENCODING(0)
    name = member.name

    def check(module: ModuleType) -> None:
        try:
            refuses(module, path, polluting_pickles()["BUILD on a member"])
            assert member.name == name
        finally:
            member._name_ = name

    check(storage)
    old = "if type(self.stack[-2]) not in _RECORDS:"
    mutant = Mutant("only classes", "pythia_fast/storage.py", old, "if callable(self.stack[-2]):")
    assert_killed(mutant, check, tmp_path)


def test_hostile_shard_is_refused_before_it_runs(tmp_path: Path) -> None:
    path, sentinel = save(tmp_path / "run", 1), tmp_path / "executed"
    payload = tmp_path / "payload.pt"
    torch.save([torch.zeros(64, 48), Calling(os.system, f"touch {sentinel}")], payload)
    torch.load(payload, weights_only=False)
    assert sentinel.exists()
    sentinel.unlink()
    shard = path / "__0_0.distcp"
    size = payload.stat().st_size

    def point_to_payload(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = shard.stat().st_size - size, size

    with shard.open("ab") as f:
        f.write(b"\0" * 20000 + payload.read_bytes())
        size += 20000
    forge(path, point_to_payload)
    size -= 20000
    forge(path, point_to_payload)
    with pytest.raises(CheckError, match="step1"):
        checkpoint.load_all(path)
    assert not sentinel.exists()


def forge(path: Path, change: Callable[[Any], None]) -> None:
    """Changes the unpickled metadata and writes both it and a manifest that fits."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    rewrite_manifest(path)


def first_info(metadata: Any) -> Any:
    return metadata.storage_data[storage.dcp_metadata.MetadataIndex("model.a", [0, 0])]


def outside(metadata: Any) -> None:
    first_info(metadata).relative_path = "../step2/__0_0.distcp"


def beyond(metadata: Any) -> None:
    first_info(metadata).offset = 1 << 40


def negative(metadata: Any) -> None:
    first_info(metadata).offset = -1


def transformed(metadata: Any) -> None:
    first_info(metadata).transform_descriptors = ["stream"]


def huge(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["model.a"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 30, 1 << 10])


def in_part(metadata: Any) -> None:
    metadata.state_dict_metadata["model.a"].size = torch.Size([65, 48])


def repeated(metadata: Any) -> None:
    """Its only chunk twice: half of the tensor would stay as the memory came."""
    entry = metadata.state_dict_metadata["model.a"]
    entry.size = torch.Size([2 * entry.size[0], entry.size[1]])
    entry.chunks = entry.chunks * 2


def second_chunk(metadata: Any, at: int) -> None:
    """model.a, [64, 48], grows to [128, 48]: its bytes again from row `at` on."""
    entry = metadata.state_dict_metadata["model.a"]
    offsets, sizes = torch.Size([at, 0]), entry.chunks[0].sizes
    entry.size = torch.Size([128, 48])
    entry.chunks.append(storage.dcp_metadata.ChunkStorageMetadata(offsets, sizes))
    index = storage.dcp_metadata.MetadataIndex("model.a", offsets)
    metadata.storage_data[index] = first_info(metadata)


def overlapping(metadata: Any) -> None:
    second_chunk(metadata, at=32)


def out_of_bounds(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["model.a"]
    entry.size = torch.Size(reversed(entry.size))


def not_a_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata["model.a"] = metadata.state_dict_metadata["model.a"].chunks[0]


def unstored(metadata: Any) -> None:
    del metadata.storage_data[storage.dcp_metadata.MetadataIndex("model.a", [0, 0])]


@pytest.mark.parametrize(
    "change",
    [
        *(outside, beyond, negative, transformed, huge, in_part, repeated, overlapping),
        *(out_of_bounds, not_a_tensor, unstored),
    ],
)
def test_forged_table_is_refused(tmp_path: Path, change: Callable[[Any], None]) -> None:
    path = save(tmp_path, 1)
    save(tmp_path, 2)
    forge(path, lambda metadata: None)
    checkpoint.load_all(path)
    forge(path, change)
    with pytest.raises(CheckError, match="metadata is refused: "):
        checkpoint.load_all(path)


def test_chunks_that_fill_a_tensor_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    a = checkpoint.load_all(path)["a"]
    forge(path, lambda metadata: second_chunk(metadata, at=64))
    assert torch.equal(checkpoint.load_all(path)["a"], torch.cat([a, a]))


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        ("        _check_disjoint(name, shape, entry.chunks)\n", "", repeated),
        ("and o + n <= whole", "", out_of_bounds),
        ("x < y + m and y < x + n", "x == y and m == n", overlapping),
    ],
)
def test_forged_table_mutants(
    tmp_path: Path, old: str, new: str, change: Callable[[Any], None]
) -> None:
    path = save(tmp_path, 1)
    forge(path, change)
    payload = (path / ".metadata").read_bytes()
    refuses(storage, path, payload)

    def check(module: ModuleType) -> None:
        refuses(module, path, payload)

    assert_killed(Mutant(old, "pythia_fast/storage.py", old, new), check, tmp_path)


# --- faults ---------------------------------------------------------------------------------------


def fault_at(point: int, code: int) -> Callable[[int, str], None]:
    def on(k: int, when: str) -> None:
        if (k, when) == (point, "before"):
            raise OSError(code, os.strerror(code))

    return on


@pytest.mark.parametrize("threads", [False, True])
def test_failing_system_calls_leave_what_was_there(
    tmp_path: Path, threads: bool, request: pytest.FixtureRequest
) -> None:
    if threads:
        request.getfixturevalue("several_files")
    save(tmp_path, 1)
    with Calls(lambda k, when: None) as calls:
        save(tmp_path, 2)
    assert {"open", "write", "fsync", "mkdir", "rename"} <= set(calls.names)
    for k in calls.points():
        for code in (errno.ENOSPC, errno.EIO):
            shutil.rmtree(checkpoint.directory(tmp_path, 2))
            with pytest.raises(InputError) as caught, Calls(fault_at(k, code)):
                save(tmp_path, 2)
            message, last = str(caught.value), k >= len(calls.names) - 2  # parent's open, fsync
            assert "\n" not in message and "step 2" in message
            assert message.startswith("disk full while saving") == (code == errno.ENOSPC), message
            assert os.strerror(code) in message
            assert f"the newest complete checkpoint is step {2 if last else 1}" in message
            assert not hidden(tmp_path), f"call {k} ({calls.names[k]})"
            assert checkpoint.steps(tmp_path) == ([1, 2] if last else [1])
            assert holds_exactly(tmp_path, 1)
            if not last:
                save(tmp_path, 2)
            assert holds_exactly(tmp_path, 2)


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def interrupt(k: int, when: str) -> None:
        if k == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Calls(interrupt):
        save(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1] and not hidden(tmp_path)


def faults(*arguments: str) -> dict[str, Any]:
    script = Path(__file__).parent / "support" / "checkpoint_faults.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_real_limit_on_the_disk(tmp_path: Path) -> None:
    report = faults("limit", str(tmp_path))
    assert report["message"].startswith("disk full while saving step 2 to ")
    assert report["message"].endswith("the newest complete checkpoint is step 1")
    assert (report["steps"], report["exact"], report["hidden"]) == ([1], True, [])


def test_kill_at_random_moments(tmp_path: Path) -> None:
    report = faults("random", str(tmp_path), "25")
    assert report["exact"] == 25
    assert report["newest"] > 25 and report["torn"] > 0, "the kills came too early to test anything"
    assert report["permanent_lost"] == []


@pytest.mark.slow
def test_kill_at_random_moments_long(tmp_path: Path) -> None:
    report = faults("random", str(tmp_path), "1000")
    assert report["exact"] == 1000 and report["permanent_lost"] == []


def test_death_at_each_system_call(tmp_path: Path) -> None:
    report = faults("points", str(tmp_path))
    assert report["failures"] == []
    assert report["faults"] == report["points"] > 60


class Journal:
    """The order of writes, syncs and renames of one save, by file name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        names: dict[int, str] = {}
        real = {n: getattr(os, n) for n in ("open", "write", "fsync", "close", "rename")}

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            fd: int = real["open"](path, *args, **kwargs)
            names[fd] = Path(path).name
            return fd

        def on_fd(event: str) -> Callable[..., Any]:
            def call(fd: int, *args: Any) -> Any:
                if fd in names:
                    self.events.append((event, names[fd]))
                if event == "close":
                    names.pop(fd, None)
                return real[event](fd, *args)

            return call

        def renamed(source: Any, target: Any) -> None:
            self.events.append(("rename", Path(target).name))
            real["rename"](source, target)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "rename", renamed)
        for event in ("write", "fsync", "close"):
            monkeypatch.setattr(os, event, on_fd(event))


def test_everything_is_on_disk_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several_files: None
) -> None:
    with monkeypatch.context() as patch:
        events = Journal(patch).events
        path = save(tmp_path, 1)
    published = events.index(("rename", "step1"))
    temporary = f".step1.{os.getpid()}"
    data = {".metadata.tmp", "manifest.json", *(p.name for p in path.glob("*.distcp"))}
    assert len(data) == 4
    for name in data:
        last_write = max(i for i, e in enumerate(events) if e == ("write", name))
        assert last_write < events.index(("fsync", name)) < events.index(("close", name)), name
        assert events.index(("close", name)) <= events.index(("close", "manifest.json")), name
    assert events.index(("close", "manifest.json")) < events.index(("fsync", temporary)) < published
    assert ("fsync", "checkpoints") in events[published:]
    assert ("fsync", tmp_path.name) in events[:published], "the new directory checkpoints/"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self._disk.attempt(lambda: os.fsync(fd))", "pass"),
        ("self._disk.attempt(lambda: _write_all(self._fd, view))", "pass"),
    ],
)
def test_sync_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    def check(module: ModuleType) -> None:
        directory = tmp_path / f"{module.__name__}"
        directory.mkdir()
        with monkeypatch.context() as patch:
            events = Journal(patch).events
            module.write_tensors(directory, contents(1))
        assert events[-2:] == [("close", ".metadata.tmp"), ("rename", ".metadata")]
        for name in (".metadata.tmp", "__0_0.distcp"):
            mine = [event for event, file in events if file == name]
            assert mine[-3:] == ["write", "fsync", "close"], name

    check(storage)
    assert_killed(Mutant(old, "pythia_fast/storage.py", old, new), check, tmp_path)


# --- retention ------------------------------------------------------------------------------------


def fake(run: Path, step: int, permanent: bool) -> None:
    path = checkpoint.directory(run, step)
    path.mkdir(parents=True)
    manifest = {"format": 1, "step": step, "permanent": permanent, "files": {}}
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(manifest))


def prune_keeps_what_it_must(module: ModuleType, run: Path) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.dictionaries(st.integers(0, 10**6), st.booleans(), max_size=12), st.integers(1, 4))
    def check(kinds: dict[int, bool], keep: int) -> None:
        shutil.rmtree(run, ignore_errors=True)
        for step, permanent in kinds.items():
            fake(run, step, permanent)
        deleted = module.prune(run, keep)
        left = set(module.steps(run))
        rolling = sorted(step for step, permanent in kinds.items() if not permanent)
        assert {step for step, permanent in kinds.items() if permanent} <= left
        assert left | set(deleted) == set(kinds) and not left & set(deleted)
        assert [s for s in rolling if s in left] == rolling[-keep:]
        assert {p.name for p in (run / "checkpoints").glob("*")} == {f"step{s}" for s in left}

    check()


def test_prune_never_deletes_a_permanent_checkpoint(tmp_path: Path) -> None:
    prune_keeps_what_it_must(checkpoint, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('.get("permanent") is False', '.get("permanent") is not None'),
        ("rolling[: max(len(rolling) - keep, 0)]", "rolling[: len(rolling) - keep]"),
        ("rolling[: max(len(rolling) - keep, 0)]", "rolling[-keep:]"),
        ("return sorted(\n        int(path", "return list(\n        int(path"),
    ],
)
def test_prune_mutants(tmp_path: Path, old: str, new: str) -> None:
    mutant = Mutant(new, "pythia_fast/checkpoint.py", old, new)
    assert_killed(mutant, lambda m: prune_keeps_what_it_must(m, tmp_path / "run"), tmp_path)


def test_the_pythia_schedule_survives_any_pruning(tmp_path: Path) -> None:
    published = [int(word) for word in PUBLISHED.split()]
    for step in published:
        fake(tmp_path, step, True)
    for step in (3, 700, 1500, 142999):
        fake(tmp_path, step, False)
    assert checkpoint.prune(tmp_path, 1) == [3, 700, 1500]
    assert checkpoint.steps(tmp_path) == sorted([*published, 142999])


def test_what_can_not_be_read_is_not_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        fake(tmp_path, step, False)
    (checkpoint.directory(tmp_path, 1) / "manifest.json").write_text("{}")
    assert checkpoint.prune(tmp_path, 1) == [2]


def test_incomplete_directories_do_not_count_and_are_cleaned(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == [] and checkpoint.newest(tmp_path) is None
    checkpoint.clean(tmp_path)
    save(tmp_path, 5)
    root = tmp_path / "checkpoints"
    (root / ".step6.4194304").mkdir()
    (root / ".step6.4194304" / "manifest.json").write_text("{}")
    (root / "step7").mkdir()
    (root / "step7" / "__0_0.distcp").write_bytes(b"torn")
    for name in ("step08", "step-1", "stepx", "my notes", "step9.bak"):
        (root / name).mkdir()
        (root / name / "manifest.json").write_text("{}")
    assert checkpoint.steps(tmp_path) == [5] and checkpoint.newest(tmp_path) == 5
    checkpoint.clean(tmp_path)
    assert {p.name for p in root.iterdir()} == {
        *("step5", "step08", "step-1", "stepx", "my notes", "step9.bak")
    }
    assert holds_exactly(tmp_path, 5)


def test_saving_where_a_deletion_was_cut_short(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path) is None
    save(tmp_path, 5)
    assert holds_exactly(tmp_path, 5)


# --- the lock -------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from pythia_fast.checkpoint import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_second_trainer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = rf"another process \(pid {holder.pid}\) is training in {run}"
        with pytest.raises(InputError, match=message), checkpoint.RunLock(run):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for _ in range(2):
        with (
            checkpoint.RunLock(run),
            pytest.raises(InputError, match=rf"\(pid {os.getpid()}\)"),
            checkpoint.RunLock(run),
        ):
            pass


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_run_directory_that_is_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(InputError, match=f"^{tmp_path}/run is not a directory$"),
        checkpoint.RunLock(tmp_path / "run" / below),
    ):
        pass


def test_a_run_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(*_: Any, **__: Any) -> None:  # for root no mode of a directory is an obstacle
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with (
        pytest.raises(InputError, match="run cannot be written: Permission denied"),
        checkpoint.RunLock(tmp_path / "run"),
    ):
        pass


def test_a_failed_start_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for run in (tmp_path / "runs" / "new", tmp_path / "there"):
        with pytest.raises(InputError, match="refused"), checkpoint.RunLock(run):
            raise InputError("refused")
        assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(InputError, match="late"), checkpoint.RunLock(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        raise InputError("late")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl"]


def test_a_lock_file_that_its_holder_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before a failing start removed it: locking that file would keep nobody out."""
    run, flock = tmp_path / "run", fcntl.flock

    def removed_meanwhile(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (run / ".lock").unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with (
        checkpoint.RunLock(run),
        pytest.raises(InputError, match=rf"\(pid {os.getpid()}\)"),
        checkpoint.RunLock(run),
    ):
        pass
