"""Deliberate faults of parallel training: what a test that passes without them must not survive."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pythia_fast import block, train
from pythia_fast.config import Config
from pythia_fast.data.loader import Share
from pythia_fast.optim import AdamW
from pythia_fast.parallel import pipeline, tensor
from pythia_fast.parallel.pipeline import Pipeline, Stage, Turn
from pythia_fast.pieces import Pieces


def _first_part(name: str, whole: Tensor, parts: int, part: int) -> Tensor:
    return tensor.local_part(name, whole, parts, 0)


def _silent_sum(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return dy, None


def _replicated_counted_by_all(self: AdamW) -> Tensor:
    part, self.mesh.part = self.mesh.part, 0
    try:
        return _grad_norm(self)
    finally:
        self.mesh.part = part


def _bias_twice(x: Tensor, *rest: Any, **named: Any) -> Any:
    y, saved = _block_fwd(x, *rest, **named)
    return y + rest[0].weights.attention_out_bias, saved


def _shifted(self: AdamW, own: Tensor, name: str) -> Pieces:
    part, self.mesh.part = self.mesh.part, self.mesh.degrees.tensor - 1 - self.mesh.part
    try:
        return _pieces(self, own, name)
    finally:
        self.mesh.part = part


def _without_the_last(self: Pipeline, losses: list[Tensor]) -> Tensor:
    return _summed(self, losses[:-1])


def _divided(self: Pipeline, tokens: Tensor, scale: float) -> Tensor:
    return _step(self, tokens, scale / self.microbatches) * self.microbatches


def _one_too_many(self: Stage, model: Any, layers: range, c: Config) -> None:
    _stage(self, model, layers, c)
    if self.last:
        del self.own[0]


def _adds_to_the_step_before(self: Turn, microbatch: int) -> None:
    _begin(self, microbatch)
    self._optimizer.fresh = False


def _sums_set_off_early(self: Turn, microbatch: int) -> None:
    _begin(self, microbatch)
    self._optimizer.last = microbatch == self._microbatches - 2


def _adds_in_autograd(self: AdamW) -> None:
    if self.last:
        _accumulate(self)


def _second_half_lost(blocks: Any) -> Any:
    taken, turns = _weights_apart(blocks), itertools.count()
    return lambda: (taken(), lambda: None)[next(turns) == 1]


def _same_rows(self: Share, batch_size: int) -> list[slice]:
    return _ranges(replace(self, copy=0), batch_size)


def _last_dropped(self: AdamW, parameter: Any, flat: Tensor) -> None:
    if self.last:
        parameter.grad.zero_()
    _take(self, parameter, flat)


_ranges, _take = Share.ranges, AdamW._take
_summed, _step, _stage = Pipeline._summed, Pipeline.step, Stage.__init__
_begin, _accumulate, _weights_apart = Turn._begin, AdamW.accumulate, pipeline.weights_apart
_grad_norm, _pieces, _block_fwd = AdamW._grad_norm, AdamW._pieces, block.block_fwd

FAULTS = {
    "every copy trains on the same rows": (Share, "ranges", _same_rows),
    "the last microbatch is dropped": (AdamW, "_take", _last_dropped),
    "every process draws the first part": (train, "local_part", _first_part),
    "partial gradients of the norms' input": (tensor.SumBackward, "backward", staticmethod(_silent_sum)),
    "replicated gradients in the norm once a process": (AdamW, "_grad_norm", _replicated_counted_by_all),
    "a row bias once a process": (block, "block_fwd", _bias_twice),
    "the loss of a microbatch is lost": (Pipeline, "_summed", _without_the_last),
    "gradients divided by the microbatches": (Pipeline, "step", _divided),
    "a layer left out": (Stage, "__init__", _one_too_many),
    "a step adds to the one before": (Turn, "_begin", _adds_to_the_step_before),
    "data-parallel sums set off a microbatch early": (Turn, "_begin", _sums_set_off_early),
    "microbatches add up in autograd": (AdamW, "accumulate", _adds_in_autograd),
    "the weights' half of a microbatch is lost": (pipeline, "weights_apart", _second_half_lost),
    "boxes of the other process": (AdamW, "_pieces", _shifted),
}  # fmt: skip


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    if name is None:
        yield
    else:
        with patch.object(*FAULTS[name][:2], FAULTS[name][2]):
            yield
