"""AdamW over flat buffers, and the learning-rate schedules.

Master weights, gradients and both moments each live in one contiguous fp32 buffer, decaying
parameters first; the model's parameters are views. One launch updates everything, the norm is one
reduction, and nothing is read back to the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pythia_fast.config import Optimizer as OptimizerConfig
from pythia_fast.ops import Ops

_ALIGN = 128  # elements; every parameter starts on a 256-byte boundary even in bf16


def learning_rate(c: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of the update numbered `step` (0-based) of `steps`.

    neox-v1: W = warmup·steps; n ≤ W: lr·n/W, so the first update moves nothing; then
    max(lr/2·(1 + cos(π·k/steps)), min_lr) with k = min(n, steps − W) − W. The cosine aims at 0,
    not at min_lr, and is cut off flat. Source: GPT-NeoX v1.0 learning_rates.py:61-93.
    cosine: rises over the same W as (n + 1)/W, then falls from lr to min_lr at the last update.
    """
    warmup = c.warmup * steps
    if c.schedule == "neox-v1":
        if warmup > 0 and step <= warmup:
            return c.lr * step / warmup
        k = min(step, steps - warmup) - warmup
        return max(c.lr / 2 * (1 + math.cos(math.pi * k / steps)), c.min_lr)
    if step + 1 < warmup:
        return c.lr * (step + 1) / warmup
    done = (step + 1 - warmup) / max(steps - warmup, 1)
    return c.min_lr + (c.lr - c.min_lr) / 2 * (1 + math.cos(math.pi * min(done, 1.0)))


def decays(name: str) -> bool:
    """Weight decay is for matrices, both embeddings included; not for biases and LayerNorms."""
    return not name.endswith("bias") and "norm" not in name


class AdamW:
    """Owns a model's weights and optimizer state.

    Construction allocates the buffers on `device` and makes the (meta) parameters of `model` views
    of them: of the fp32 master itself when dtype is fp32, else of a `dtype` copy that every update
    rewrites. Weights are undefined until initialised or loaded; `sync_weights` follows a load.
    """

    def __init__(
        self,
        model: nn.Module,
        c: OptimizerConfig,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.ops = c, ops
        named = sorted(model.named_parameters(), key=lambda item: not decays(item[0]))  # stable
        self.slots: dict[str, tuple[int, torch.Size]] = {}
        end = self.decay_until = 0
        for name, parameter in named:
            self.slots[name] = (end, parameter.shape)
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
            if decays(name):
                self.decay_until = end
        # padding between parameters stays 0: its gradient, moments and update are 0
        self.master, self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(end, dtype=torch.float32, device=device) for _ in range(4)
        )
        self.weight = None if dtype == torch.float32 else torch.zeros_like(self.master, dtype=dtype)
        self.steps_taken = 0
        self._scalars = torch.zeros(2, dtype=torch.float32, device=device)  # lr, t
        self._parameters = self._bind(model)
        self._fresh = True  # the next gradient overwrites instead of adding
        self._torch = self._make_torch_adamw() if self._backend(device) == "torch" else None

    # --- buffers and views ---

    def _bind(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        compute = self.master if self.weight is None else self.weight
        weights, grads = self.views(compute), self.views(self.grad)
        bound = []
        for name in [n for n, _ in model.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(weights[name])
            setattr(model.get_submodule(owner), leaf, parameter)
            bound.append((parameter, grads[name]))
        return bound

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of a flat buffer, in the parameter's shape."""
        return {
            name: flat[start : start + shape.numel()].view(shape)
            for name, (start, shape) in self.slots.items()
        }

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: `model.`, `exp_avg.`, `exp_avg_sq.` + name, fp32 views."""
        buffers = {"model": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}.{name}": view
            for kind, flat in buffers.items()
            for name, view in self.views(flat).items()
        }

    @torch.no_grad()
    def sync_weights(self, from_model: bool = False) -> None:
        """Copies master -> compute weights, or back after weights were drawn in the model."""
        if self.weight is not None:
            source, target = (
                (self.weight, self.master) if from_model else (self.master, self.weight)
            )
            target.copy_(source)

    # --- a step ---

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds the model's gradients to the flat fp32 ones and frees them; the first overwrites."""
        for parameter, flat in self._parameters:
            assert parameter.grad is not None
            if self._fresh:
                flat.copy_(parameter.grad)
            else:
                flat.add_(parameter.grad)
            parameter.grad = None
        self._fresh = False

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clips, updates master and compute weights; returns the norm before clipping (on device).

        clip factor = min(1, clip/(norm + 1e-6)) over all parameters (GPT-NeoX v1.0).
        """
        c = self.config
        self.steps_taken += 1
        self._scalars.copy_(torch.tensor([lr, float(self.steps_taken + c.step_offset)]))
        norm = self.ops.grad_norm(self.grad)
        scale = (c.clip / (norm + 1e-6)).clamp(max=1.0)
        if self._torch is not None:
            # the fused kernel divides gradients by grad_scale on the way (GradScaler's interface)
            self._torch.grad_scale = scale.reciprocal()  # type: ignore[attr-defined]
            self._torch.step()
            self.sync_weights()
        else:
            self.ops.adamw_(
                self.weight, self.master, self.exp_avg, self.exp_avg_sq, self.grad,
                decay_until=self.decay_until,
                lr=self._scalars[0:1], step=self._scalars[1:2], grad_scale=scale.view(1),
                betas=c.betas, eps=c.eps, weight_decay=c.weight_decay,
            )  # fmt: skip
        self._fresh = True
        return norm

    def _backend(self, device: torch.device) -> str:
        if self.config.backend != "auto":
            return self.config.backend
        return "triton" if self.ops.name == "triton" else "torch"

    def _make_torch_adamw(self) -> torch.optim.AdamW:
        """torch's fused AdamW over the same buffers, as two flat parameters."""
        c, cut = self.config, self.decay_until
        groups = []
        for part, decay in ((slice(0, cut), c.weight_decay), (slice(cut, None), 0.0)):
            flat = nn.Parameter(self.master[part])
            flat.grad = self.grad[part]
            groups.append({"params": [flat], "weight_decay": decay, "part": part})
        optimizer = torch.optim.AdamW(
            groups, lr=self._scalars[0], betas=c.betas, eps=c.eps, fused=True
        )
        optimizer.found_inf = torch.zeros((), device=self.master.device)  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            optimizer.state[group["params"][0]] = {
                "step": torch.tensor(float(c.step_offset), device=self.master.device),
                "exp_avg": self.exp_avg[group["part"]],
                "exp_avg_sq": self.exp_avg_sq[group["part"]],
            }
        return optimizer

    def resume_at(self, steps_taken: int) -> None:
        """Continues the step count after `state` was loaded."""
        self.steps_taken = steps_taken
        for state in self._torch.state.values() if self._torch is not None else ():
            state["step"].fill_(float(steps_taken + self.config.step_offset))
        self.sync_weights()
