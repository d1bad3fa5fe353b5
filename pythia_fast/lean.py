"""AdamW with 8 bytes of state a parameter, for models that fp32 states leave no room for.

bf16 weights and 16-bit remainders that are the fp32 master to the bit, and bf16 moments, rounded at
random (`kernels/adam_lean.py`): another recipe than the published one, since the moments are not
theirs. Gradients add up in precision.gradients: with bf16, 10 bytes a parameter in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pythia_fast.errors import InputError
from pythia_fast.kernels.rounding import joined_master, split_master
from pythia_fast.optim import AdamW
from pythia_fast.pieces import Pieces


class LeanAdamW(AdamW):
    """As `AdamW`, without a master buffer; seed: of the random rounding."""

    def __init__(self, *arguments: Any, seed: int, **more: Any) -> None:
        self._seed = seed
        super().__init__(*arguments, **more)

    def _allocate(self) -> None:
        if self.mesh.degrees.world > 1:
            raise InputError("optimizer.states = 'lean' on several processes is not there yet")
        size = self.layout.size
        self.weight, self.exp_avg, self.exp_avg_sq = (self._zeros(size, "bf16") for _ in range(3))
        self.remainder = torch.zeros(size, dtype=torch.int16, device=self._device)
        self.grad = self._zeros(size, self.precision.gradients)
        self._own_weight, self._own_grad = self.weight, self.grad
        self._key = torch.full((1,), self._seed, dtype=torch.int64, device=self._device)

    def state(self) -> dict[str, Tensor | Pieces]:
        """As that of fp32 states, whose readers take it: on the host, made one by one, exact."""
        remainders = self.views(self.remainder)
        state: dict[str, Tensor | Pieces] = {
            f"model.{name}": joined_master(weight.contiguous(), remainders[name].contiguous()).cpu()
            for name, weight in self.views(self.weight).items()
        }
        for kind, flat in self._moments():
            state |= {f"{kind}.{name}": v.float().cpu() for name, v in self.views(flat).items()}
        return state

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> None:
        """Splits the loaded masters; moments are rounded, which those of lean states were."""
        weights, remainders = self.views(self.weight), self.views(self.remainder)
        for name, weight in weights.items():
            high, low = split_master(state[f"model.{name}"].to(self._device))
            weight.copy_(high)
            remainders[name].copy_(low)
        for kind, flat in self._moments():
            for name, view in self.views(flat).items():
                if f"{kind}.{name}" in state:  # an import may have weights alone
                    view.copy_(state[f"{kind}.{name}"])

    def _moments(self) -> tuple[tuple[str, Tensor], ...]:
        return ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)

    @torch.no_grad()
    def sync_weights(self, from_model: bool = False) -> None:
        """The weights are half of the master: after they were drawn the other half is 0."""
        if from_model:
            self.remainder.zero_()

    def _update(self, grad_scale: Tensor) -> None:
        c = self.config
        for part, rate in self._parts():
            self.ops.adamw_lean_(
                self.weight[part], self.remainder[part], self.exp_avg[part], self.exp_avg_sq[part],
                self.grad[part],
                decay_until=max(self.layout.decay_until - part.start, 0),
                lr=self._scalars[rate : rate + 1], step=self._scalars[1:2],
                grad_scale=grad_scale.view(1), seed=self._key, first=part.start,
                betas=c.betas, eps=c.eps, weight_decay=c.weight_decay,
            )  # fmt: skip

    def _backend(self) -> str:
        return "ops"
