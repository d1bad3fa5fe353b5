"""CUDA graphs without a GPU: what torch and Triton launch is recorded, and replayed without Python.

A capture leaves memory as it was, as on a GPU, where nothing runs; it refuses to read a value back.
A replay repeats the recorded launches on the recorded memory: what the host computed meanwhile is
baked in, and memory that the capture allocated holds NaN before, so that nothing is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from triton.runtime.interpreter import InterpretedFunction

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)  # fmt: skip


def tensors(*trees: Any) -> list[Tensor]:
    return [t for t in tree_iter(trees) if isinstance(t, Tensor)]


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Launches(TorchDispatchMode):
    """Sees every operation of torch and every launch of a kernel, those of the backward too."""

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def launch(self, run: Callable[[], None], arguments: list[Tensor]) -> None:
        run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.operation(func, args, kwargs or {})

    def __enter__(self):  # type: ignore[no-untyped-def]
        self._run = InterpretedFunction.run
        mode, original = self, self._run

        def run(function: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                mode.launch(lambda: original(function, *args, **kwargs), tensors(args, kwargs))

        InterpretedFunction.run = run
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        InterpretedFunction.run = self._run
        super().__exit__(*error)


class Capture(Launches):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.fresh: dict[int, torch.UntypedStorage] = {}  # allocated inside
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.kept: list[Tensor] = []  # no address is used twice

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in READS:
            raise RuntimeError(f"{func}: not permitted while a stream is capturing")
        schema = func._schema.arguments
        for i, argument in enumerate(schema):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                self._will_write(tensors(value))
        given = {address(t) for t in tensors(args, kwargs)}
        out = func(*args, **kwargs)
        made = [t for t in tensors(out) if address(t) not in given]
        self.kept += made
        self.fresh |= {address(t): t.untyped_storage() for t in made}
        if func not in EMPTY:

            def again() -> None:
                found = [t for t in tensors(func(*args, **kwargs)) if address(t) not in given]
                for old, new in zip(made, found, strict=True):
                    old.copy_(new)

            self.calls.append(again)
        return out

    def launch(self, run: Callable[[], None], arguments: list[Tensor]) -> None:
        self._will_write(arguments)
        self.kept += arguments
        run()
        self.calls.append(run)

    def _will_write(self, targets: list[Tensor]) -> None:
        for t in targets:
            storage, key = t.untyped_storage(), address(t)
            if key and key not in self.fresh and key not in self.before:
                self.before[key] = storage, storage.clone()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, contents in self.before.values():
            storage.copy_(contents)
        self.before.clear()


class CUDAGraph:
    def __init__(self) -> None:
        self.capture: Capture | None = None
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        assert self.capture is not None
        self.replays += 1
        with _disable_current_modes():
            for storage in self.capture.fresh.values():
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)  # type: ignore[call-overload]
            for call in self.capture.calls:
                call()


class Stream:
    """Keeps an order of waits; everything runs at once anyway."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Cuda:
    """What `pythia_fast.graph` asks of torch.cuda."""

    CUDAGraph = CUDAGraph

    def __init__(self) -> None:
        self.log: list[str] = []
        self._current = Stream(self.log, "main")

    def Stream(self) -> Stream:
        return Stream(self.log, "side")

    def current_stream(self) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append("done")

    @contextmanager
    def graph(self, graph: CUDAGraph, capture_error_mode: str) -> Iterator[None]:
        self.log.append("capture")
        graph.capture = Capture()
        with graph.capture:
            yield
