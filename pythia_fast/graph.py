"""The device's part of a step as one CUDA graph: recorded once, replayed every step after.

What is recorded reads the token ids from one buffer and the learning rate and Adam's t from the
optimizer's scalars; all three are written before each replay, and nothing else changes from step
to step. The first WARMUP calls run as they stand, on a stream of their own, as a capture wants it
(kernels compiled, handles and workspaces made): they are steps of the run, so no step is taken
twice and no state has to be put back. A capture itself executes nothing.

Memory: what the steps before had cached is released at the capture; activations then live in the
graph's own pool, so that whatever runs between replays (validation, saving) has memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, cuda

from pythia_fast.progress import say

Compute = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids (batch_size, T + 1) int64 -> loss and gradient norm, on the device."""
WARMUP = 2


class StepGraph:
    """Takes the place of `compute`; its two results hold until the next call overwrites them."""

    def __init__(self, compute: Compute, device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._calls = 0
        self._tokens: Tensor | None = None
        self._graph: cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, Tensor] | None = None

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: in pinned memory or on the device; always of one shape, else ValueError."""
        if self._tokens is None:
            self._tokens = torch.empty_like(tokens, device=self._device)
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"tokens {tuple(tokens.shape)}, first {tuple(self._tokens.shape)}")
        self._tokens.copy_(tokens, non_blocking=True)
        self._calls += 1
        if self._calls <= WARMUP:
            return self._aside(self._tokens)
        if self._graph is None:
            self._graph = cuda.CUDAGraph()
            # another thread may be saving a checkpoint, whose waits are none of this capture's
            with cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = self._compute(self._tokens)
        self._graph.replay()
        assert self._results is not None
        return self._results

    def _aside(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A call on another stream, before and after which the current one is waited for."""
        current, stream = cuda.current_stream(), cuda.Stream()
        stream.wait_stream(current)
        with cuda.stream(stream):
            results = self._compute(tokens)
        current.wait_stream(stream)
        return results


def graphed(compute: Compute, device: torch.device, obstacle: str | None) -> Compute:
    """compute as a graph on a GPU; where an obstacle is named, as it is, which is said."""
    if device.type != "cuda":
        return compute
    if obstacle is not None:
        say(f"kernels.graph: the step runs launch by launch, {obstacle}")
        return compute
    return StepGraph(compute, device)
