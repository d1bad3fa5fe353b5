"""Kernels that were compiled before: PYTHIA_FAST_AOT names the directory (`pythia-fast prebuild`).

Where it is not set, the one that the installed package carries, if it carries one; set to nothing,
none.

Triton looks a kernel up by a hash of its source and of what it calls, its arguments' types,
constants and alignment, its options, the GPU, and the compiler. The directory is laid out by that
key, so what another version or configuration needs is not found there, whatever the names: it is
compiled as ever, which is said once.

    DIR/manifest.json         {"triton": version, "kernels": [names]}
    DIR/KEY/NAME.cubin, NAME.json
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from triton import __version__, knobs
from triton.runtime.cache import CacheManager, FileCacheManager

from pythia_fast.errors import InputError
from pythia_fast.progress import say

VARIABLE = "PYTHIA_FAST_AOT"
CARRIED = Path(__file__).parent / "prebuilt_kernels"  # by a wheel (CMakeLists.txt)


class PrebuiltCache(CacheManager):
    """What Triton asks for its files, one a key: the directory first, then Triton's own cache."""

    source = VARIABLE  # who names the directory
    directory = Path()
    kernels: frozenset[str] = frozenset()
    missed = False  # whether it was said that a kernel is compiled
    refused: Path | None = None  # what was said to be of another Triton

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._arguments = (key, override, dump)
        self._prebuilt = None if override or dump else self.directory / key
        self._own: FileCacheManager | None = None

    @property
    def own(self) -> FileCacheManager:
        """Triton's, which makes a directory as soon as it exists."""
        if self._own is None:
            self._own = FileCacheManager(*self._arguments)
        return self._own

    def get_group(self, filename: str) -> dict[str, str] | None:
        name = filename.removesuffix(".json")
        if self._prebuilt is not None and name in self.kernels:
            if (self._prebuilt / filename).exists():
                return {file.name: str(file) for file in self._prebuilt.iterdir()}
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


def use_prebuilt() -> None:
    """Has Triton look in the directory that the environment names, or in the package's own.

    Raises InputError where that is no such directory. One of another Triton is left alone, and
    that is said.
    """
    named = os.environ.get(VARIABLE)
    if named is None and CARRIED.exists():
        source, directory = "the package's kernels", CARRIED
    elif named:
        source, directory = VARIABLE, Path(named).resolve()
    else:
        return
    if knobs.cache.manager_class is PrebuiltCache or directory == PrebuiltCache.refused:
        return
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        version, kernels = manifest["triton"], frozenset(manifest["kernels"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{source}: no manifest.json of `pythia-fast prebuild` in {directory}"
        ) from None
    if version != __version__:
        PrebuiltCache.refused = directory
        versions = f"is of triton {version}, this is {__version__}"
        say(f"{source}: {directory} {versions}: compiling instead")
        return
    PrebuiltCache.source, PrebuiltCache.directory, PrebuiltCache.kernels = (
        source,
        directory,
        kernels,
    )
    knobs.cache.manager_class = PrebuiltCache
