"""Layouts of one run over many GPUs, and the bytes that each GPU holds, by arithmetic.

Activations are those that the fused blocks keep, also where they are not used (16-bit gradients,
weights fully sharded): there this is less than it takes.

Letters: b rows of a microbatch, T positions, h hidden, P pipeline degree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pythia_fast import plan, stages
from pythia_fast.communication import FP32
from pythia_fast.config import Config
from pythia_fast.stages import Chunk

WIDTH = 2  # bytes of the compute dtype


@dataclass(frozen=True)
class Layout:
    """Degrees and what else decides memory and time; rows: of a microbatch."""

    data: int
    tensor: int
    pipeline: int
    sequence: bool
    schedule: str
    stages_per_rank: int
    shard: str
    rows: int

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU of a layout that needs most."""

    states: float  # weights, master weights, moments, accumulated gradients
    gradients: float  # of a microbatch, until they are accumulated
    activations: float  # of all microbatches in flight
    logits: float  # and what waits for the head's backward
    working: float  # statistics, and what head or backward of a block hold beyond the logits
    buffers: float  # received activations and gradients; weights and gradients gathered by shards

    @property
    def total(self) -> float:
        found = self.states + self.gradients + self.activations + self.logits
        return found + self.working + self.buffers


class Held:
    """What the GPUs of one layout of `c` hold; layers are cut by what they cost on a card."""

    def __init__(self, c: Config, layout: Layout, gpu: plan.Gpu) -> None:
        self.config, self.layout, self.gpu = c, layout, gpu
        m, seq_len = c.model, c.data.seq_len
        self.microbatches = c.train.batch_size // (layout.data * layout.rows)
        self.tokens = layout.rows * seq_len
        p, sequence = layout.tensor, layout.sequence
        self.layer = stages.layer_seconds(m, gpu, seq_len, self.tokens, p, sequence)
        self.ends = stages.end_seconds(m, gpu, self.tokens, p)
        self.chunks = stages.cut(
            m.layers, layout.pipeline * layout.stages_per_rank,
            self.layer.total, self.ends[0].total, self.ends[1].total,
        )  # fmt: skip
        self.accumulated = plan.GRADIENT[c.precision.gradients]
        self.reduced = plan.GRADIENT[c.precision.gradient_sum]

    def of_rank(self, rank: int) -> tuple[Chunk, ...]:
        """The chunks of a pipeline rank: every P-th stage."""
        return self.chunks[rank :: self.layout.pipeline]

    def parameters(self, rank: int) -> int:
        """Of a pipeline rank's tensor part, before data-parallel sharding."""
        m, p = self.config.model, self.layout.tensor
        return sum(stages.parameters(m, chunk, p) for chunk in self.of_rank(rank))

    def memory(self) -> Memory:
        """Of the pipeline rank that needs most."""
        return max(map(self.memory_of, range(self.layout.pipeline)), key=lambda found: found.total)

    def memory_of(self, rank: int) -> Memory:
        c, at = self.config, self.layout
        m, n, chunks = c.model, self.parameters(rank), self.of_rank(rank)
        held = stages.in_flight(
            at.schedule, rank, at.pipeline, self.microbatches, at.stages_per_rank
        )
        of_layer = plan.activation_bytes(
            m, c.kernels.recompute == "selective", at.tensor, at.sequence, layers=1
        )
        last = any(chunk.head for chunk in chunks)
        logits = WIDTH * m.vocab_size // at.tensor * self.tokens * last
        fused = c.precision.gradients == "fp32" and c.kernels.deterministic
        fused = fused and (at.shard != "full" or at.data == 1)
        waiting = 0  # microbatches between the head and its backward, or its weights' half
        if at.pipeline > 1 and at.schedule in ("gpipe", "zero-bubble"):
            waiting = (held - 1) * last
        of_head = m.hidden if fused else m.vocab_size // at.tensor  # a token: x's gradient, logits
        by_autograd = 2 * m.hidden * last if fused else n  # the last norm's
        layers = max(chunk.layers for chunk in chunks)
        return Memory(
            states=self._states(n),
            gradients=WIDTH * by_autograd * (at.shard != "full"),
            activations=of_layer * layers * self.tokens * held,
            logits=logits + WIDTH * of_head * self.tokens * waiting,
            working=plan.working_bytes(m, c.kernels.recompute == "selective", at.tensor)
            * self.tokens,
            buffers=self._received(rank) + self._gathered(chunks),
        )

    def _states(self, n: int) -> float:
        """Of n parameters, by what data-parallel ranks split; sums have a buffer of their own."""
        c, at = self.config.precision, self.layout
        everything = (plan.STATES + self.accumulated) * n
        if at.data == 1:
            return everything
        if at.shard == "full":
            return everything / at.data
        if at.shard == "optimizer":
            split = plan.STATES - WIDTH  # master weights and moments
            return everything - split * n + (split + self.reduced) * n / at.data
        return everything + self.reduced * n * (c.gradient_sum != c.gradients)

    def _received(self, rank: int) -> float:
        """torch's PipelineStage allocates a buffer a microbatch for what it receives, both ways."""
        at = self.layout
        if at.pipeline == 1:
            return 0.0
        ends = (rank == 0) + (rank == at.pipeline - 1)
        sides = 2 * at.stages_per_rank - ends
        return sides * self.microbatches * self.row_message()

    def _gathered(self, chunks: tuple[Chunk, ...]) -> float:
        """shard = full: two layers' weights and the ends', the gradient of the largest, twice."""
        if self.layout.shard != "full":
            return 0.0
        m, p = self.config.model, self.layout.tensor
        layer = stages.parameters(m, Chunk(1), p)
        ends = [stages.parameters(m, replace(chunk, layers=0), p) for chunk in chunks]
        return WIDTH * (2 * layer + sum(ends)) + (WIDTH + FP32) * max(layer, *ends)

    def row_message(self) -> float:
        """Bytes that stages send a microbatch: b·T·h, a tensor part of it with sequence."""
        split = self.layout.tensor if self.layout.sequence else 1
        return WIDTH * self.tokens * self.config.model.hidden / split
