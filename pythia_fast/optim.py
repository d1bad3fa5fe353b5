"""AdamW over flat buffers, and what a step does with its gradients.

Master weights and both moments each live in one contiguous fp32 buffer, gradients in one of their
own dtype; the model's parameters are views, where `flat.py` puts them. One launch updates
everything, the norm is one reduction, and only loss scaling reads anything back to the host.

On several processes the buffers hold this one's part of each tensor-parallel parameter, and where
optimizer states are sharded (`parallel/data.py`) master and moments are those of its own pieces.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pythia_fast.config import Optimizer as OptimizerConfig
from pythia_fast.config import Parallel, Precision
from pythia_fast.flat import lay_out
from pythia_fast.loss_scale import LossScale
from pythia_fast.ops import Ops
from pythia_fast.parallel.data import Arrival, Ownership, Reduction, at_hand, in_place_of
from pythia_fast.parallel.mesh import Mesh
from pythia_fast.parallel.tensor import split_dim
from pythia_fast.pieces import Pieces, boxes_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class AdamW:
    """Owns a model's weights and optimizer state.

    Construction allocates the buffers on `device` and makes the (meta) parameters of `model` views
    of them: of the fp32 master itself where precision.compute is fp32, else of a copy in that dtype
    that every update rewrites. Weights are undefined until initialised or loaded; `sync_weights`
    follows a load.
    """

    def __init__(
        self,
        model: nn.Module,
        c: OptimizerConfig,
        precision: Precision,
        ops: Ops,
        device: torch.device,
        mesh: Mesh | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        """mesh, parallel: this process among others, and what they share; None: it is alone."""
        self.config, self.precision, self.ops = c, precision, ops
        self.mesh, self.parallel = mesh or Mesh.alone(device), parallel or Parallel()
        shard = self.parallel.shard if self.mesh.degrees.data > 1 else "none"
        self._sharded, self._full = shard == "optimizer", shard == "full"
        self._copies = None if self._full else self.mesh.group("data")  # who adds gradients up here
        shapes = {name: at_hand(parameter).shape for name, parameter in model.named_parameters()}
        copies = self.mesh.degrees.data if self._sharded else 1
        self.layout = layout = lay_out(shapes, c.decay_embeddings, copies, paired=not self._full)
        self.slots = layout.slots
        self.own = Ownership(layout.buckets, copies, self.mesh.copy if self._sharded else 0)
        self._device = device
        self._allocate()
        self._sum = None  # of the ranks so far
        if precision.ranks > 1:
            self._sum = self._zeros(self.own.size, precision.gradient_sum)
        self.loss_scale = None
        if precision.loss_scaling != "none":
            self.loss_scale = LossScale(hysteresis=precision.loss_scaling == "hysteresis")
        self.updates = 0  # applied: skipped steps are none
        # learning rate, t, learning rate of the row biases
        self._scalars = torch.zeros(3, dtype=torch.float32, device=device)
        self._parameters = self._bind(model)
        self.arrival = None  # of what other processes have updated
        if self._sharded:
            assert self._copies is not None
            self.arrival = Arrival(self.weight, self.own, model, self._copies)
        self.fresh = self._first_rank = True  # the next gradient overwrites instead of adding
        self.last = False  # the gradients of this microbatch are the last of the step
        self._reduction = self._make_reduction()
        self._torch = self._make_torch_adamw() if self._backend() == "torch" else None

    # --- buffers and views ---

    def _allocate(self) -> None:
        """Buffers of states and gradients.

        Padding between parameters stays 0: its gradient, moments and update are 0.
        """
        precision, size = self.precision, self.layout.size
        self.master, self.exp_avg, self.exp_avg_sq = (
            self._zeros(self.own.size, "fp32") for _ in range(3)
        )
        self.grad = self._zeros(size, precision.gradients)
        # the model's weights are views of `weight`; an update writes master and `_own_weight`
        wide = precision.compute == "fp32" or self._full  # FSDP casts what it gathers
        in_master = wide and not self._sharded
        self.weight = self.master if in_master else self._zeros(size, precision.compute)
        self._own_weight, self._own_grad = None if wide else self.weight, self.grad
        if self._sharded:
            self._own_weight = None if wide else self._zeros(self.own.size, precision.compute)
            self._own_grad = self._zeros(self.own.size, precision.gradients)

    def _zeros(self, size: int, dtype: str) -> Tensor:
        return torch.zeros(size, dtype=DTYPES[dtype], device=self._device)

    def _bind(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        weights, grads = self.views(self.weight), self.views(self.grad)
        bound = []
        for name in [n for n, _ in model.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(in_place_of(model.get_parameter(name), weights[name]))
            setattr(model.get_submodule(owner), leaf, parameter)
            bound.append((parameter, grads[name]))
        return bound

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of a flat buffer, in the parameter's shape."""
        return {name: slot.of(flat) for name, slot in self.slots.items()}

    def hand_over(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Flat gradients of parameters, in their order, which the caller adds to from now on.

        Between two calls of `accumulate` it does so once, overwriting where `fresh`.
        """
        flats = {id(p): flat for p, flat in self._parameters}
        theirs = [flats.pop(id(p)) for p in parameters]
        self._parameters = [(p, flat) for p, flat in self._parameters if id(p) in flats]
        return theirs

    def state(self) -> dict[str, Tensor | Pieces]:
        """What a checkpoint holds: `model.`, `exp_avg.`, `exp_avg_sq.` + name, fp32 views.

        Nothing is under way between processes after it, which is how a run ends.
        """
        self._settle_weights()
        buffers = {"model": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        alone = self.mesh.degrees.world == 1
        return {
            f"{kind}.{name}": slot.of(own) if alone else self._pieces(own, name)
            for kind, own in buffers.items()
            for name, slot in self.slots.items()
        }

    def _pieces(self, own: Tensor, name: str) -> Pieces:
        """A parameter's boxes in one of the own buffers, at their place in the whole parameter."""
        slot, mesh, dim = self.slots[name], self.mesh, split_dim(name)
        whole, shift = list(slot.shape), [0] * len(slot.shape)
        if self._full:
            shift[0] = mesh.copy * whole[0]
            whole[0] *= mesh.degrees.data
        if dim is not None:
            shift[dim] += mesh.part * whole[dim]
            whole[dim] *= mesh.degrees.tensor
        split = self._sharded or self._full
        alone = (dim is not None or mesh.part == 0) and (split or mesh.copy == 0)
        pieces = Pieces(torch.Size(whole), own.dtype, writes=alone)
        for part, piece in zip(self.own.of_own(own), self.own.pieces, strict=True):
            for offsets, box in boxes_of(part, piece, slot.start, slot.shape, slot.stride):
                moved = torch.Size(o + s for o, s in zip(offsets, shift, strict=True))
                pieces.boxes.append((moved, box))
        return pieces

    def take(self, state: Mapping[str, Any]) -> None:
        """Follows a load into what `state` gave: views of the buffers, which hold it already."""

    @torch.no_grad()
    def sync_weights(self, from_model: bool = False) -> None:
        """Copies master -> compute weights, or back after weights were drawn in the model."""
        self._settle_weights()
        if from_model:
            self.own.take(self.master, self.weight)
        elif self._own_weight is not None:
            self._own_weight.copy_(self.master)
        if not from_model:
            self._share_weights()

    def _settle_weights(self) -> None:
        """Waits for all that is under way between processes: what it reads may be written then."""
        if self.arrival is not None:
            self.arrival.finish()

    def _share_weights(self) -> None:
        if self.arrival is not None:
            self.arrival.start(self.master if self._own_weight is None else self._own_weight)

    # --- a step ---

    @property
    def loss_factor(self) -> float:
        """What the mean loss of a step is multiplied by before backward: loss scale and ranks.

        Each rank takes the mean of its own rows; their sum is divided by their number in `step`.
        """
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        return scale * self.precision.ranks

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds the model's gradients to the flat ones and frees them; the first overwrites.

        The sum is rounded to precision.gradients each time.
        """
        for parameter, flat in self._parameters:
            if parameter.grad is not None:  # else taken on the way
                self._take(parameter, flat)
        self.fresh = False

    def _take(self, parameter: nn.Parameter, flat: Tensor) -> None:
        assert parameter.grad is not None
        if self.fresh:
            flat.copy_(at_hand(parameter.grad))
        else:
            flat.add_(at_hand(parameter.grad))
        parameter.grad = None
        self.finished([flat])

    def finished(self, grads: Iterable[Tensor]) -> None:
        """These flat gradients have what this microbatch adds; of the last one they set off."""
        if self._reduction is not None and self.last:
            self._reduction.finished(grads)

    def _make_reduction(self) -> Reduction | None:
        """The sum over data-parallel processes, for which gradients are taken as they are made."""
        if self._copies is None:
            return None
        owner = weakref.proxy(self)  # the collector does not see what hooks of a parameter hold
        for parameter, flat in self._parameters:

            @torch.no_grad()
            def take(p: nn.Parameter, flat: Tensor = flat) -> None:
                if p.grad is not None:  # else the fused embedding or head has taken it on the way
                    owner._take(p, flat)

            parameter.register_post_accumulate_grad_hook(take)
        total = self._own_grad if self._sum is None else self._sum
        views = [flat for _, flat in self._parameters]
        return Reduction(self.grad, total, self.own, views, self._copies)

    @torch.no_grad()
    def end_rank(self) -> None:
        """Adds what one data-parallel rank accumulated to the sum over ranks, in its dtype.

        The original's all-reduce adds in an order of its own; here it is that of the ranks. Ranks
        that are processes add up in `apply`.
        """
        if self._sum is not None and self._reduction is None:
            if self._first_rank:
                self._sum.copy_(self.grad)
            else:
                self._sum.add_(self.grad)
            self._first_rank, self.fresh = False, True

    def step(self, lr: float) -> Tensor:
        """A whole update: `begin`, then `apply`."""
        self.begin(lr)
        return self.apply()

    def begin(self, lr: float) -> None:
        """Counts the next update and writes its learning rates and Adam's t to the device."""
        self.updates += 1
        t = float(self.updates + self.config.step_offset)
        for i, value in enumerate((lr, t, lr * self.config.row_bias_copies)):
            self._scalars[i].fill_(value)  # by kernel argument: a copy from the host would wait

    @torch.no_grad()
    def apply(self) -> Tensor:
        """Clips, updates master and compute weights; returns the norm before clipping (on device).

        An update that overflowed under loss scaling is skipped: `updates` is as before `begin`, the
        norm is not finite. Raises CheckError where loss scaling gives up.
        """
        self._add_up()
        norm = self._grad_norm()
        self.fresh = self._first_rank = True
        self.last = False
        unscale = 1.0
        if self.loss_scale is not None:
            before, overflow = self.loss_scale.scale, not bool(norm.isfinite())
            self.loss_scale.update(overflow)
            if overflow:
                self.updates -= 1
                return norm
            after_update = self.precision.unscale_after_update
            unscale = self.loss_scale.scale if after_update else before
        norm = norm / unscale
        self._update(grad_scale=self._clip_factor(norm) / unscale)
        return norm

    def _add_up(self) -> None:
        """_own_grad: the sum of all ranks and processes."""
        if self._reduction is not None:
            self._reduction.finish()
        if self._sum is not None:
            self._own_grad.copy_(self._sum.mul_(1 / self.precision.ranks))
        part, below = self.mesh.group("tensor"), self.own.below
        if part is not None:  # partial where vocabulary, heads and 4h are (parallel/tensor.py)
            end = self.own.size if self.parallel.sequence else below(self.layout.row_biases_from)
            partial = self._own_grad[below(self.layout.replicated_from) : end]
            if partial.numel():
                dist.all_reduce(partial, group=part)

    def _grad_norm(self) -> Tensor:
        """Norm of all gradients; replicated parameters count `norm_copies` times.

        Each process adds what it alone owns: of replicated parameters the first tensor-parallel
        one, of unsharded states the first data-parallel one.
        """
        copies, mesh, world = self.config.norm_copies, self.mesh, self.mesh.degrees.world
        norm = self.ops.grad_norm(self._own_grad)
        if world == copies == 1:
            return norm
        replicated = self.ops.grad_norm(
            self._own_grad[self.own.below(self.layout.replicated_from) :]
        )
        square = norm.square() + ((copies if mesh.part == 0 else 0) - 1) * replicated.square()
        if world > 1:
            if not (self._sharded or self._full) and mesh.copy > 0:
                square.zero_()
            dist.all_reduce(square)
        return square.sqrt()

    def _clip_factor(self, norm: Tensor) -> Tensor:
        """min(1, clip/(norm + clip_eps)). Source: DeeperSpeed stage1.py:785-805."""
        return (self.config.clip / (norm + self.config.clip_eps)).clamp(max=1.0)

    def _update(self, grad_scale: Tensor) -> None:
        """AdamW with gradients times grad_scale; p-fold row biases move by p·lr.

        Each of p equal copies moves by lr and has the gradient of their sum, Adam does not see
        the scale of a parameter, and biases do not decay: exactly p·lr for the sum.
        """
        c = self.config
        self._settle_weights()
        if self._torch is not None:
            # the fused kernel divides gradients by grad_scale on the way (GradScaler's interface)
            self._torch.grad_scale = grad_scale.reciprocal()  # type: ignore[attr-defined]
            self._torch.step()
            self.sync_weights()
            return
        until = self.own.below(self.layout.decay_until)
        for part, rate in self._parts():
            weight = None if self._own_weight is None else self._own_weight[part]
            self.ops.adamw_(
                weight, self.master[part], self.exp_avg[part], self.exp_avg_sq[part],
                self._own_grad[part],
                decay_until=max(until - part.start, 0),
                lr=self._scalars[rate : rate + 1], step=self._scalars[1:2],
                grad_scale=grad_scale.view(1),
                betas=c.betas, eps=c.eps, weight_decay=c.weight_decay,
            )  # fmt: skip
        self._share_weights()

    @property
    def on_kernels(self) -> bool:
        """Whether the ops' kernel updates, not torch's AdamW."""
        return self._torch is None

    def _parts(self) -> list[tuple[slice, int]]:
        """(range, index of its learning rate in _scalars): everything, or row biases apart."""
        end, cut = self.own.size, self.own.below(self.layout.row_biases_from)
        if self.config.row_bias_copies == 1 or cut == end:
            return [(slice(0, end), 0)]
        return [(slice(0, cut), 0), (slice(cut, end), 2)]

    def _backend(self) -> str:
        if self.config.backend != "auto":
            return self.config.backend
        fused = self.ops.name != "triton" and self.grad.dtype == torch.float32
        return "torch" if fused else "ops"

    def _make_torch_adamw(self) -> torch.optim.AdamW:
        """torch's fused AdamW over the same buffers, as flat parameters."""
        c, cut = self.config, self.own.below(self.layout.decay_until)
        groups = []
        for part, rate in ((p, r) for whole, r in self._parts() for p in _split(whole, cut)):
            flat = nn.Parameter(self.master[part])
            flat.grad = self._own_grad[part]
            decay = c.weight_decay if part.stop <= cut else 0.0
            lr = self._scalars[rate]
            groups.append({"params": [flat], "part": part, "lr": lr, "weight_decay": decay})
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

    def resume_at(self, updates: int, loss_scale: Any = None) -> None:
        """Continues the counts after `state` was loaded; loss_scale: as `LossScale.state` gave."""
        self.updates = updates
        if self.loss_scale is not None and loss_scale is not None:
            self.loss_scale.load(loss_scale)
        for state in self._torch.state.values() if self._torch is not None else ():
            state["step"].fill_(float(updates + self.config.step_offset))
        self.sync_weights()


def _split(whole: slice, at: int) -> list[slice]:
    """whole cut in two at `at`, without empty parts."""
    parts = (slice(whole.start, min(at, whole.stop)), slice(max(at, whole.start), whole.stop))
    return [part for part in parts if part.start < part.stop]
