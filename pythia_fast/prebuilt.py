"""Kernels that were compiled before: PYTHIA_FAST_AOT names the directory (`pythia-fast prebuild`).

Where it is not set, the one that the installed package carries, if it carries one; set to nothing,
none.

Triton looks a kernel up by a hash of its source and of what it calls, its arguments' types,
constants and alignment, its options, the GPU, and the compiler. The directory is laid out by that
key, so what another version or configuration needs is not found there, whatever the names: it is
compiled as ever, which is said once.

    DIR/manifest.json         {"triton": version}
    DIR/KEY/NAME.cubin, NAME.json, NAME.sha256

NAME.sha256 has a line for each of the two and is written last: what is torn, changed or half copied
is compiled as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from triton import __version__, knobs
from triton.runtime.cache import CacheManager, FileCacheManager

from pythia_fast.errors import InputError
from pythia_fast.kernels.grids import GRIDS
from pythia_fast.progress import say

VARIABLE = "PYTHIA_FAST_AOT"
CARRIED = Path(__file__).parent / "prebuilt_kernels"  # by a wheel (CMakeLists.txt)
SEAL = ".sha256"


def seal(folder: Path, name: str) -> str:
    """Contents of NAME.sha256 for the two files of a kernel. Raises OSError."""
    files = [folder / f"{name}{kind}" for kind in (".cubin", ".json")]
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)


def sealed(folder: Path, name: str) -> dict[str, str] | None:
    """A kernel's files as Triton wants them, name -> path; None where they are not as sealed."""
    try:
        if (folder / f"{name}{SEAL}").read_text() != seal(folder, name):
            return None
    except (OSError, ValueError):
        return None
    return {f"{name}{kind}": str(folder / f"{name}{kind}") for kind in (".cubin", ".json")}


def version_of(directory: Path) -> str:
    """The Triton whose kernels a directory holds. Raises InputError where there is no manifest."""
    try:
        return str(json.loads((directory / "manifest.json").read_text())["triton"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"no manifest.json of `pythia-fast prebuild` in {directory}") from None


class PrebuiltCache(CacheManager):
    """What Triton asks for its files, one a key: the directory first, then the cache it had."""

    source = VARIABLE  # who names the directory
    directory = Path()
    behind: type[CacheManager] = FileCacheManager
    missed = False  # whether it was said that a kernel is compiled
    refused: Path | None = None  # what was said to be of another Triton

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._arguments = (key, override, dump)
        self._prebuilt = None if override or dump else self.directory / key
        self._own: CacheManager | None = None

    @property
    def own(self) -> CacheManager:
        """The cache without this one: Triton's makes a directory as soon as it exists."""
        if self._own is None:
            self._own = self.behind(*self._arguments)
        return self._own

    def get_group(self, filename: str) -> dict[str, str] | None:
        name = filename.removesuffix(".json")
        if self._prebuilt is not None and name in GRIDS:
            found = sealed(self._prebuilt, name)
            if found is not None:
                return found
            self._say_missed(name)
        return self.own.get_group(filename)

    def _say_missed(self, name: str) -> None:
        if not PrebuiltCache.missed:
            PrebuiltCache.missed = True
            say(
                f"{self.source}: {name} is not in {self.directory} as this run launches it; it is"
                " compiled now, and so are others of which that is true"
            )

    def get_file(self, filename: str) -> str | None:
        return self.own.get_file(filename)

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
        return self.own.put(data, filename, binary)

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        return self.own.put_group(filename, group)


def chosen() -> tuple[str, Path] | None:
    """Who names a directory, and which: the environment, else the package that carries one."""
    named = os.environ.get(VARIABLE)
    if named is None and CARRIED.exists():
        return "the package's kernels", CARRIED
    return (VARIABLE, Path(named).resolve()) if named else None


def use_prebuilt() -> None:
    """Has Triton look in the directory that the environment names, or in the package's own.

    Raises InputError where that is no such directory. One of another Triton is left alone, and
    that is said.
    """
    found = chosen()
    if found is None or knobs.cache.manager_class is PrebuiltCache:
        return
    source, directory = found
    if directory == PrebuiltCache.refused:
        return
    try:
        version = version_of(directory)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if version != __version__:
        PrebuiltCache.refused = directory
        versions = f"is of triton {version}, this is {__version__}"
        say(f"{source}: {directory} {versions}: compiling instead")
        return
    PrebuiltCache.source, PrebuiltCache.directory = source, directory
    PrebuiltCache.behind = knobs.cache.manager_class or FileCacheManager
    knobs.cache.manager_class = PrebuiltCache
