"""Checkpoints: published atomically, checked byte by byte, never lost to retention.

    <run>/checkpoints/step1000/    __0_0.distcp  .metadata    torch.distributed.checkpoint files
                                   manifest.json              written last: sha256 of each file

`save` fills a hidden directory beside the others, syncs it to disk and renames it, so that a
directory `step<N>` with a manifest is complete whatever happened. `load` compares every byte with
the manifest before anything is unpickled. Tensors carry one flat name a parameter
("model.<parameter>", "exp_avg.<parameter>"), never a rank: any layout can load them.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pythia_fast.config import Config, resolve
from pythia_fast.data.files import sha256_file
from pythia_fast.errors import CheckError, InputError
from pythia_fast.parallel.mesh import Mesh
from pythia_fast.pieces import Pieces
from pythia_fast.progress import say
from pythia_fast.run_lock import RunLock
from pythia_fast.storage import (
    kind,
    publish_directory,
    read_metadata,
    read_tensors,
    remove_tree,
    sync_directory,
    write_synced,
    write_tensors,
)

FORMAT = 1
MANIFEST = "manifest.json"
_OWN_KEYS = {"format", "step", "permanent", "torch", "world", "files", "digest"}
_HASH_THREADS = 8

PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 143001, 1000))


class Incomplete(InputError):
    """A file that the manifest names is not there."""


def schedule(spec: Literal["pythia"] | Sequence[int], total_steps: int) -> list[int]:
    """The steps kept for ever, ascending: those of `spec` up to total_steps, which is always one.

    "pythia": 0, 1, 2, 4 .. 512, 1000, 2000 .. 143000 (154 of them), as the suite published.
    """
    steps = PYTHIA_STEPS if spec == "pythia" else spec
    return sorted({total_steps, *(int(s) for s in steps if int(s) <= total_steps)})


# --- which checkpoints there are ------------------------------------------------------------------


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, or would."""
    return run_dir / "checkpoints" / f"step{step}"


def steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    return sorted(
        int(path.name[4:])
        for path in root.iterdir()
        if _is_step(path.name) and (path / MANIFEST).is_file()
    )


def newest(run_dir: Path) -> int | None:
    """The last complete checkpoint's step; None where there is none."""
    return max(steps(run_dir), default=None)


def _is_step(name: str) -> bool:
    digits = name.removeprefix("step")
    return name.isascii() and digits.isdecimal() and name == f"step{int(digits)}"


# --- saving ---------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor | Pieces],
    extra: dict[str, Any],
    permanent: bool,
    mesh: Mesh | None = None,
) -> Path:
    """Publishes `tensors` (flat names, any device) as <run>/checkpoints/step<N> and returns it.

    extra: plain JSON values that become keys of the manifest. A permanent checkpoint is never
    pruned. mesh: the processes that save together, each what it holds; all call this. Raises
    InputError (on all) where the step exists already or the disk refuses; what was there before
    stays as it was.
    """
    if taken := extra.keys() & _OWN_KEYS:
        raise ValueError(f"extra: {min(taken)} is a key of every manifest")
    final = directory(run_dir, step)
    mesh = mesh or Mesh.alone(torch.device("cpu"))
    try:
        with ExitStack() as stack:

            def begin() -> Path | None:
                if not mesh.main:
                    return None
                if (final / MANIFEST).exists():
                    raise InputError(f"{final} exists already: a checkpoint is never overwritten")
                remove_tree(final)  # of a deletion cut short
                return stack.enter_context(publish_directory(final))

            temporary = mesh.together(begin)[0]
            assert temporary is not None
            manifest = {
                **extra,
                "format": FORMAT,
                "step": step,
                "permanent": permanent,
                "torch": torch.__version__,
                "world": {"processes": mesh.degrees.world},
                "files": write_tensors(temporary, tensors, mesh.control),
            }

            def publish() -> None:
                if mesh.main:
                    write_synced(temporary / MANIFEST, _manifest_bytes(manifest))
                    stack.close()

            mesh.together(publish)
    except OSError as error:
        failure = InputError(_save_failure(run_dir, step, error))
        failure.shared = True  # `together` raised its cause
        raise failure from error
    return final


def start_run(run_dir: Path, step: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> Path:
    """Publishes an imported checkpoint as the first of a new run and returns it.

    Raises InputError where run_dir holds a run already.
    """
    with RunLock(run_dir):
        if (run_dir / "config.toml").exists() or steps(run_dir):
            raise InputError(f"{run_dir} holds a run already")
        return save(run_dir, step, tensors, extra, permanent=True)


def _save_failure(run_dir: Path, step: int, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "disk full while saving" if full else "cannot save"
    there = newest(run_dir)
    rest = "there is no complete checkpoint yet"
    if there is not None:
        rest = f"the newest complete checkpoint is step {there}"
    return f"{what} step {step} to {directory(run_dir, step)}: {error.strerror or error}, {rest}"


# --- the manifest ---------------------------------------------------------------------------------


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest; "digest" is the sha256 of the rest in the same spelling."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(_spelling(rest)).hexdigest()
    return _spelling({**rest, "digest": digest})


def _spelling(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory, itself intact; the other files are not read.

    Raises InputError where there is none and CheckError where it was changed.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except OSError as error:
        newer = newest(path)
        if newer is not None:
            hint = f"name one of its checkpoints, the newest is {directory(path, newer)}"
            raise InputError(f"{path} is a run: {hint}") from None
        raise InputError(f"{path}: no complete checkpoint ({MANIFEST}: {error.strerror})") from None
    try:
        manifest = json.loads(data)
        intact = isinstance(manifest, dict) and _manifest_bytes(manifest) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckError(f"{file} is damaged: it does not match its own digest")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{file}: format {manifest.get('format')}, this version reads {FORMAT}")
    _check_manifest(file, manifest)
    return manifest


def config_of(path: Path) -> Config:
    """The configuration that a checkpoint was trained with. Raises InputError as `resolve` does."""
    keys = read_manifest(path).get("config")
    if not isinstance(keys, dict):
        raise InputError(f"{path / MANIFEST} holds no config")
    return resolve(keys, where=f"{path / MANIFEST}: ")


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(step, int) or not isinstance(files, dict):
        raise CheckError(f"{file}: no step or no files in it")
    for name, entry in files.items():
        if name != Path(name).name or name in ("", "..", MANIFEST):
            raise CheckError(f"{file}: {name!r} is not the name of a file in this directory")
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
        ):
            raise CheckError(f"{file}: {name!r} has no bytes or no sha256")
    if _is_step(file.parent.name) and file.parent.name != f"step{step}":
        raise CheckError(f"{file} is of step {step}: the checkpoint is out of its place")


def verify(path: Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """Compares every file with the manifest (sha256) and returns the manifest.

    Reads bytes and unpickles nothing. mesh: processes that share the work; all call this.

    Raises CheckError naming the first file that is left over or changed; Incomplete where one is
    missing; InputError where the manifest is.
    """
    mesh = mesh or Mesh.alone(torch.device("cpu"))
    return mesh.together(lambda: _verify(path, mesh.rank, mesh.degrees.world))[0]


def _verify(path: Path, rank: int, world: int) -> dict[str, Any]:
    """Names and sizes of all files, and the sha256 of one in `world` of them."""
    manifest = read_manifest(path)
    files = manifest["files"]
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    for name in sorted(files.keys() - present):
        raise Incomplete(f"{path / name} is missing")
    for name in sorted(present - files.keys()):
        raise CheckError(f"{path / name} is not in the manifest")
    for name in sorted(files):
        size = (path / name).stat().st_size
        if size != files[name]["bytes"]:
            raise CheckError(f"{path / name}: {size} bytes where {files[name]['bytes']} were saved")
    size = sum(entry["bytes"] for entry in files.values())
    if size > 4e9 and rank == 0:
        say(f"verifying {path} ({size / 1e9:.1f} GB)")
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        mine = sorted(files)[rank::world]
        digests = pool.map(sha256_file, [path / name for name in mine])
        for name, digest in zip(mine, digests, strict=True):
            if digest != files[name]["sha256"]:
                raise CheckError(f"{path / name} is damaged: its sha256 is not the saved one")
    return manifest


# --- loading --------------------------------------------------------------------------------------


def load(
    path: Path, into: Mapping[str, Tensor | Pieces], mesh: Mesh | None = None
) -> dict[str, Any]:
    """Fills the tensors `into` in place, all the names of the checkpoint, and returns its manifest.

    Verified first. mesh: processes that load together, each what it holds; all call this.

    Raises CheckError on damage, InputError naming the first tensor that is
    missing, unexpected, or of another shape or dtype.
    """
    mesh = mesh or Mesh.alone(torch.device("cpu"))
    manifest = verify(path, mesh)
    names = {name for held in mesh.together(lambda: list(into)) for name in held}
    mesh.together(lambda: _load(path, manifest, into, names))
    return manifest


def _load(
    path: Path, manifest: dict[str, Any], into: Mapping[str, Tensor | Pieces], names: set[str]
) -> None:
    """names: what all processes load together."""
    metadata = read_metadata(path, manifest["files"])
    saved = metadata.state_dict_metadata
    for name in into:
        if name not in saved:
            raise InputError(f"{path} does not hold the tensor {name}")
    for name, entry in saved.items():
        if name not in names:
            raise InputError(f"{path} holds the tensor {name}, which is not expected")
        if name not in into:
            continue
        here, there = _describe(into[name].shape, into[name].dtype), _describe(*kind(entry))
        if here != there:
            raise InputError(f"{path}: {name} is {there}, expected {here}")
    read_tensors(path, metadata, into)


def load_all(path: Path, prefix: str = "model.") -> dict[str, Tensor]:
    """Name without `prefix` -> tensor on the CPU, for all saved names that start with it."""
    metadata = read_metadata(path, verify(path)["files"])
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if name.startswith(prefix):
            shape, dtype = kind(entry)
            tensors[name] = torch.empty(shape, dtype=dtype)
    if not tensors:
        raise InputError(f"{path} holds no tensor {prefix}*")
    read_tensors(path, metadata, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _describe(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# --- retention ------------------------------------------------------------------------------------


def prune(run_dir: Path, keep: int) -> list[int]:
    """Deletes the rolling checkpoints but the newest `keep`; returns the deleted steps.

    A permanent checkpoint, or one whose manifest cannot be read, is never deleted.
    """
    rolling = [step for step in steps(run_dir) if _is_rolling(directory(run_dir, step))]
    doomed = rolling[: max(len(rolling) - keep, 0)]
    for step in doomed:
        path = directory(run_dir, step)
        try:
            (path / MANIFEST).unlink()  # first: a deletion cut short leaves no complete checkpoint
            sync_directory(path)
        except OSError as error:
            raise InputError(f"cannot delete {path}: {error.strerror}") from error
        remove_tree(path)
    return doomed


def _is_rolling(path: Path) -> bool:
    try:
        return read_manifest(path).get("permanent") is False
    except (CheckError, InputError):
        return False


def clean(run_dir: Path) -> None:
    """Removes what dead savers and deletions cut short left. The caller holds the run's lock."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return
    for path in root.iterdir():
        unpublished = path.name.startswith(".step")
        torn = _is_step(path.name) and not (path / MANIFEST).exists()
        if path.is_dir() and not path.is_symlink() and (unpublished or torn):
            if torn:
                say(f"{path} is incomplete (no {MANIFEST}): removed")
            remove_tree(path)
