"""What a public op of the kernels is to the check and the benchmarks, and one call of it.

Shapes of the suite's sizes, random inputs that repeat, and the results of a call by name: the same
for kernel, reference and peer, on values that no call can spoil. `op_table.py` lists the ops.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pythia_fast.kernels import reference
from pythia_fast.recipe import SUITE

MAX_FLAT = 1 << 27  # elements of the optimizer's flat buffers, whatever the size


@dataclass(frozen=True)
class Shape:
    """What one Pythia size makes of a microbatch."""

    size: str
    batch: int
    positions: int
    layers: int
    hidden: int
    heads: int
    vocab: int

    @property
    def rows(self) -> int:
        return self.batch * self.positions

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def flat(self) -> int:
        """Elements of a flat parameter buffer, at most MAX_FLAT; odd where that does not cut it."""
        weights = self.layers * 12 * self.hidden**2 + 2 * self.vocab * self.hidden
        return min(weights + 1, MAX_FLAT)


SIZES = tuple(name.removeprefix("pythia-") for name in SUITE)


def shape(size: str, batch: int, positions: int) -> Shape:
    """The shape of "70m" and so on; the tiny sizes of tests are made with Shape itself."""
    published = SUITE[f"pythia-{size}"]
    fields = {k: published[f"model.{k}"] for k in ("layers", "hidden", "heads")}
    return Shape(size, batch, positions, vocab=published["model.vocab_size"], **fields)


class Draw:
    """N(0, 1) tensors of one device, the same sequence for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device).to(dtype)

    def targets(self, rows: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (rows,), generator=self.generator, device=self.device)


Inputs = Callable[[Shape, torch.dtype, Draw], dict[str, Any]]


@dataclass(frozen=True)
class Op:
    """One public op in one form.

    `inputs(shape, dtype, draw)` gives its keyword arguments; `draw` makes N(0, 1) tensors.
    bytes_moved: per pass, necessary bytes for elements of `size` bytes (every input read once,
    every output written once); empty where the op is bound by FLOPs.
    """

    label: str
    file: str
    name: str
    inputs: Inputs
    key: Callable[[Shape], tuple[int, ...]]  # shapes of equal key are one case
    bytes_moved: dict[str, Callable[[Shape, int], int]]
    differentiable: tuple[str, ...] = ()
    consumed: tuple[str, ...] = ()  # the op may write over these
    written: tuple[str, ...] = ()  # results that are arguments
    # of the arguments after a call, where they are compared as something else
    seen: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None
    # per pass, of a shape and its inputs, where FLOPs bound the op
    flops: dict[str, Callable[[Shape, dict[str, Any]], float]] = field(default_factory=dict)
    products: bool = False  # matrix products, whose operands are rounded on the way
    repeats: bool = True  # two runs give the same bits

    @property
    def kernel(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"pythia_fast.kernels.{self.file}"), self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed: "forward" and "backward", or "both" where one launch serves both."""
        return tuple(self.flops) or tuple(self.bytes_moved)


def arguments(op: Op, inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Fresh leaves for what is differentiable, clones of what is consumed or written.

    dtype: what every floating tensor becomes (float64 for the exact result); None leaves them.
    """

    def one(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(name, entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        wide = value if dtype is None or not value.is_floating_point() else value.to(dtype)
        if name in op.differentiable:
            return wide.detach().clone().requires_grad_()
        return wide.clone() if name in op.consumed + op.written else wide

    return {name: one(name, value) for name, value in inputs.items()}


def call(op: Op, function: Callable[..., Any], values: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of one call; a differentiable argument that is consumed goes in as a copy."""
    passed = {
        name: value.clone() if name in op.consumed and name in op.differentiable else value
        for name, value in values.items()
    }
    outputs = function(**passed)
    if outputs is None:
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def upstream(op: Op, outputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the outputs: N(0, 1) rounded to dtype, 0.5 for a scalar loss."""
    gradients = []
    for index, output in enumerate(outputs):
        if output.dim() == 0:
            gradients.append(torch.full_like(output, 0.5))
        else:
            drawn = Draw(output.device, seed=1000 + index)(*output.shape, dtype=dtype)
            gradients.append(drawn.to(output.dtype))
    return gradients


def results(
    op: Op,
    function: Callable[..., Any],
    inputs: dict[str, Any],
    dtype: torch.dtype,
    wide: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, gradients ("d_x") and written arguments of one call, by name.

    dtype: that of the test, in which upstream gradients are rounded; wide: as in `arguments`.
    """
    values = arguments(op, inputs, wide)
    outputs = call(op, function, values)
    found = {f"out{i}" if len(outputs) > 1 else "out": t for i, t in enumerate(outputs)}
    if op.differentiable:
        leaves = [values[name] for name in op.differentiable]
        gradients = torch.autograd.grad(outputs, leaves, upstream(op, outputs, dtype))
        found |= {f"d_{n}": g for n, g in zip(op.differentiable, gradients, strict=True)}
    if op.seen is not None:
        found |= op.seen(values)
    else:
        found |= {name: _joined(values[name]) for name in op.written if values[name] is not None}
    return {name: value.detach() for name, value in found.items()}


def _joined(value: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in value]) if isinstance(value, list) else value
