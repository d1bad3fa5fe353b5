"""Pipeline parallelism: P processes hold consecutive layers, and microbatches pass through them.

A stage is some layers, the first with the embedding before them, the last with the final norm and
the head after; parameters keep the whole model's names. Layers are cut so that the slowest stage is
as fast as can be (`stages.py`). Schedules are those of torch.distributed.pipelining, which has the
sends and receives; what is ours is the stage, where gradients go, and that losses add up.

Every stage's gradients add up in the optimizer's flat buffer, microbatch by microbatch, as without
a pipeline (`Turn`), and those of data-parallel processes meet as the last microbatch has them. In
zero-bubble schedules a backward has two halves: that of the inputs, which the stage before waits
for, and that of the weights, which fills the gaps. torch finds the halves in autograd's graph; the
fused blocks have theirs (`Block.waiting`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from pythia_fast import plan, stages
from pythia_fast.config import Config
from pythia_fast.model import Pythia
from pythia_fast.parallel.mesh import Mesh

if TYPE_CHECKING:
    from pythia_fast.block import Block
    from pythia_fast.optim import AdamW

SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL = {
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


def layers_of_stages(c: Config) -> list[range]:
    """The layers of each of pipeline x stages_per_rank stages, in order."""
    gpu, tokens = plan.GPUS["H100"], c.train.micro_batch_size * c.data.seq_len
    layer = stages.layer_seconds(c.model, gpu, c.data.seq_len, tokens)
    first, last = stages.end_seconds(c.model, gpu, tokens)
    count = c.parallel.pipeline * c.parallel.stages_per_rank
    chunks = stages.cut(c.model.layers, count, layer.total, first.total, last.total)
    ends = itertools.accumulate((chunk.layers for chunk in chunks), initial=0)
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def keep_own(model: Pythia, c: Config, mesh: Mesh) -> None:
    """Drops from a model on the meta device what this process's stages do not hold."""
    own, layers = layers_of_stages(c)[mesh.stage :: c.parallel.pipeline], c.model.layers
    held = {i for stage in own for i in stage}
    for i in range(layers):
        if i not in held:
            model.gpt_neox.layers._modules.pop(str(i))  # the others keep their numbers
    if 0 not in held:
        del model.gpt_neox.embed_in
    if layers - 1 not in held:
        del model.gpt_neox.final_layer_norm
        del model.embed_out


class Stage(nn.Module):
    """Token ids (b, T) or x (b, T, h) -> x; the last stage's is normalised, for the head."""

    def __init__(self, model: Pythia, layers: range, c: Config) -> None:
        super().__init__()
        self.seq_len = c.data.seq_len
        self.first, self.last = layers.start == 0, layers.stop == c.model.layers
        self._model = [model]  # not a submodule: a process's stages share it
        held = list(model.gpt_neox.layers._modules)  # the process's, by number
        self.own = [held.index(str(i)) for i in layers]
        parts = [model.gpt_neox.layers._modules[str(i)] for i in layers]
        parts += [model.gpt_neox.embed_in] if self.first else []
        parts += [model.gpt_neox.final_layer_norm, model.embed_out] if self.last else []
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        (model,) = self._model
        blocks = model.blocks(self.seq_len, x.device)
        if self.first:
            x = model.embed(x)
        for i in self.own:
            x = blocks[i](x)
        return model.gpt_neox.final(x) if self.last else x

    def blocks(self) -> list[Block]:
        """The stage's fused blocks."""
        fused = self._model[0].fused
        assert fused is not None
        return [fused.blocks[i] for i in self.own]


class Turn(PipelineStage):
    """A stage as torch's schedules call it: each call is a microbatch's turn.

    Microbatches come in order, so the first overwrites the stage's flat gradients and the last
    completes them; what autograd made joins them before the next turn.
    """

    def __init__(self, *of_torch: Any, optimizer: AdamW, microbatches: int, **named: Any) -> None:
        super().__init__(*of_torch, **named)
        self._optimizer, self._microbatches = optimizer, microbatches

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        self._begin(fwd_chunk_id)  # the fused head adds its gradient when it forms the loss
        return super().forward_one_chunk(fwd_chunk_id, *rest, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> None:
        self._begin(bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *rest, **named)
        self._optimizer.accumulate()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> None:
        self._begin(bwd_chunk_id)
        super().backward_weight_one_chunk(bwd_chunk_id, *rest, **named)
        self._optimizer.accumulate()

    def _begin(self, microbatch: int) -> None:
        self._optimizer.fresh = microbatch == 0
        self._optimizer.last = microbatch == self._microbatches - 1


class Pipeline:
    """This process's stages and the schedule that runs them."""

    def __init__(self, model: Pythia, optimizer: AdamW, c: Config, mesh: Mesh) -> None:
        p, group = c.parallel, mesh.group("pipeline")
        assert group is not None
        self.model, self.mesh, self.c = model, mesh, c
        self.dtype = optimizer.weight.dtype
        every = layers_of_stages(c)
        self.stages = [Stage(model, layers, c) for layers in every[mesh.stage :: p.pipeline]]
        self.first, self.last = self.stages[0].first, self.stages[-1].last
        self.microbatches = c.train.batch_size // (c.train.micro_batch_size * mesh.degrees.data)
        self._scale = 1.0  # of each microbatch's loss
        apart = p.schedule == "zero-bubble" and model.fused is not None
        turns: list[Any] = [
            Turn(
                s, mesh.stage + i * p.pipeline, len(every), mesh.device, *self._shapes(s),
                group=group, dw_builder=weights_apart(s.blocks()) if apart else None,
                optimizer=optimizer, microbatches=self.microbatches,
            )
            for i, s in enumerate(self.stages)
        ]  # fmt: skip
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        if p.schedule in SINGLE:  # torch's 1F1B asks for as many microbatches as stages
            few = self.microbatches < p.pipeline
            schedule = ScheduleGPipe if few else SINGLE[p.schedule]
            self.schedule: Any = schedule(turns[0], self.microbatches, **options)
        else:
            self.schedule = SEVERAL[p.schedule](turns, self.microbatches, **options)

    def _shapes(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """A microbatch before and after a stage, on the meta device.

        Told none, torch would find them out by a forward and a backward pass of its own, and the
        fused block would add that pass's gradients to the step's.
        """
        b, positions = self.c.train.micro_batch_size, self.c.data.seq_len
        tokens = torch.empty((b, positions), dtype=torch.int64, device="meta")
        x = self._empty(b, "meta").requires_grad_()
        after = x.new_empty((b, positions, x.shape[-1])).requires_grad_() if stage.last else x
        return tokens if stage.first else x, after

    def step(self, tokens: Tensor, scale: float) -> Tensor:
        """Forward and backward of this copy's rows (M·b, T + 1); scale·Σ of their losses.

        Only the first and the last stage read tokens. The loss is on every process of the pipeline.
        """
        self._scale = scale
        losses: list[Tensor] = []
        inputs, targets = self._inputs(tokens), self._targets(tokens, losses)
        self.schedule.step(*inputs, **targets, return_outputs=False)
        return self._summed(losses)

    @torch.no_grad()
    def evaluate(self, rows: Tensor, scale: float) -> Tensor:
        """scale·Σ of the losses of one microbatch (b, T + 1), forward alone."""
        self._scale = scale
        group, losses = self.mesh.group("pipeline"), []
        assert group is not None
        before, after = ((group.rank() + d) % group.size() for d in (-1, 1))
        for stage in self.stages:
            x = rows[:, :-1]
            if not stage.first:
                x = self._empty(len(rows), self.mesh.device)
                dist.recv(x, group=group, group_src=before)
            x = stage(x)
            if stage.last:
                losses.append(self._loss(x, rows[:, 1:]))
            else:
                dist.send(x.contiguous(), group=group, group_dst=after)
        return self._summed(losses)

    def _empty(self, rows: int, device: torch.device | str) -> Tensor:
        """What passes between stages: (rows, T or T/P, h)."""
        c, split = self.c, self.mesh.degrees.tensor if self.c.parallel.sequence else 1
        shape = (rows, c.data.seq_len // split, c.model.hidden)
        return torch.empty(shape, dtype=self.dtype, device=device)

    def _inputs(self, tokens: Tensor) -> list[Tensor]:
        return [tokens[:, :-1].contiguous()] if self.first else []

    def _targets(self, tokens: Tensor, losses: list[Tensor]) -> dict[str, Any]:
        return {"target": tokens[:, 1:].contiguous(), "losses": losses} if self.last else {}

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.model.head_loss(x.flatten(0, 1), targets.flatten(), self._scale)

    def _summed(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for loss in losses:
            total += loss.detach()
        return self.mesh.sum_(total, "pipeline")


def weights_apart(blocks: Iterable[Block]) -> Callable[[], Callable[[], None]]:
    """Lets the weights' halves of these blocks wait.

    Returns what torch calls after a backward, for a call that runs the halves that now wait.
    """
    waiting: list[Callable[[], None]] = []
    for block in blocks:
        block.waiting = waiting

    def taken() -> Callable[[], None]:
        halves, waiting[:] = waiting[:], []

        def run() -> None:
            for half in halves:
                half()

        return run

    return taken
