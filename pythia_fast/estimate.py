"""Communication and time of one step of a layout.

Everything is arithmetic on `plan` (kernels), `stages` (parts of the model) and `communication`
(links); nothing is measured, and no GPU or torch is needed. A step of M microbatches:

    step = M·c + bubble + exposed communication + optimizer      c: of the slowest pipeline rank

bubble: the other ranks' share of filling and draining the pipeline, as in `simulation`. Exposed:
- tensor: all of it, though the products of a layer's weights run beside its backward all-reduce.
- data, shard none or optimizer: what is left of a bucket a layer after the last microbatch's
  backward (gradients) and after the first forward (weights); at least one bucket of each.
- data, shard full: per microbatch, the first gather and the last reduce-scatter, and what a layer's
  neighbours take longer than it computes.
- pipeline: sends at filling and draining (`stages.sends_waited_for`); in 1f1b also those of the way
  there and back, once every P microbatches, where no rank is slow enough to hide them.

Not counted: NCCL's own buffers, losses of clock and bandwidth of kernels beside collectives,
recomputation, checkpoints, stragglers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pythia_fast import plan, stages
from pythia_fast.communication import (
    FP32,
    NODE,
    Axis,
    Collective,
    Fabric,
    Group,
    Kind,
    collective,
    seconds,
)
from pythia_fast.config import Config
from pythia_fast.layouts import WIDTH, Held, Layout
from pythia_fast.stages import Chunk, Seconds, sends_waited_for


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, one part after the other."""

    compute: float
    optimizer: float
    bubble: float
    tensor: float
    data: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.bubble + self.exposed

    @property
    def exposed(self) -> float:
        return self.tensor + self.data + self.pipeline


class Estimate(Held):
    """What one layout of `c` costs on a card and a fabric; everything is computed when asked."""

    def __init__(self, c: Config, layout: Layout, gpu: plan.Gpu, on: Fabric) -> None:
        super().__init__(c, layout, gpu)
        self.fabric = on
        self.copies = Group.strided(layout.data, layout.tensor)
        self.parts = Group.strided(layout.tensor, 1)
        self.whole = Group.strided(layout.gpus, 1)
        self.neighbours = Group(2, 1 if layout.gpus <= NODE else 2)

    # --- communication ----------------------------------------------------------------------------

    def collectives(self) -> list[Collective]:
        """By kind, each as often as the pipeline rank has it that has it most."""
        return [*self._each_microbatch(), *self._once_a_step]

    def _each_microbatch(self) -> list[Collective]:
        at, times, on = self.layout, self.microbatches, self.fabric
        found: list[Collective] = []
        if at.tensor > 1:
            layers = max(
                sum(chunk.layers for chunk in self.of_rank(rank)) for rank in range(at.pipeline)
            )
            found += [
                collective("tensor", kind, what, self.parts, count * times, self._rows(), on)
                for what, count in (
                    ("layers, forward", layers), ("layers, backward", layers),
                    ("embedding, forward", 1), ("head, backward", 1),
                )
                for kind in self._kinds()
            ]  # fmt: skip
            found.append(
                collective("tensor", "all-gather", "cross-entropy statistics", self.parts, times,
                           self._statistics(), on)
            )  # fmt: skip
        if at.data > 1 and at.shard == "full":
            exposed = [times * sum(part) for part in zip(*map(self._full_exposed, self.of_rank(0)),
                                                         strict=True)]  # fmt: skip
            units = sum(len(self._units(chunk)) for chunk in self.of_rank(0))
            n = max(map(self.parameters, range(at.pipeline))) / units
            parts: tuple[tuple[Kind, str, float], ...] = (
                ("all-gather", "weights, forward", WIDTH * n),
                ("all-gather", "weights, backward", WIDTH * n),
                ("reduce-scatter", "gradients", self.reduced * n),
            )
            found += [
                collective("data", kind, what, self.copies, times * units, size, on, part)
                for (kind, what, size), part in zip(parts, exposed, strict=True)
            ]
        if at.pipeline > 1:
            found.append(
                collective("pipeline", "send", "activations, and their gradients", self.neighbours,
                           2 * at.stages_per_rank * times, self.row_message(), on,
                           self._sends_exposed())
            )  # fmt: skip
        return found

    @cached_property
    def _once_a_step(self) -> list[Collective]:
        at, m, on = self.layout, self.config.model, self.fabric
        found: list[Collective] = []
        if at.tensor > 1:
            shared = max(
                sum(stages.replicated(m, chunk, at.sequence) for chunk in self.of_rank(rank))
                for rank in range(at.pipeline)
            )
            found.append(
                collective("tensor", "all-reduce", "LayerNorm gradients", self.parts, 1,
                           FP32 * shared, on)
            )  # fmt: skip
        if at.data > 1 and at.shard != "full":
            n = max(map(self.parameters, range(at.pipeline))) / self.buckets
            parts: list[tuple[Kind, str, float, float]] = [
                (self._reduction, "gradients", self.reduced * n, self._last_backward())
            ]  # fmt: skip
            if at.shard == "optimizer":
                parts.append(("all-gather", "weights", WIDTH * n, self.ranks[0].forward))
            for kind, what, size, beside in parts:
                left = self._left_over(beside, self.buckets * seconds(kind, self.copies, size, on))
                found.append(
                    collective("data", kind, what, self.copies, self.buckets, size, on, left)
                )
        axis: Axis = "data" if at.data > 1 else "tensor" if at.tensor > 1 else "pipeline"
        if at.gpus > 1:
            found.append(collective(axis, "all-reduce", "gradient norm", self.whole, 1, FP32, on))
        return found

    def _kinds(self) -> tuple[Kind, ...]:
        """Of what sums rows over tensor ranks; both move what the all-reduce moves."""
        return ("reduce-scatter", "all-gather") if self.layout.sequence else ("all-reduce",)

    @property
    def _reduction(self) -> Kind:
        """Of gradients over copies, once a step."""
        return "all-reduce" if self.layout.shard == "none" else "reduce-scatter"

    def _rows(self) -> float:
        return WIDTH * self.tokens * self.config.model.hidden

    def _statistics(self) -> float:
        """Maximum, sum and target logit of each row, of all tensor ranks."""
        return 3 * FP32 * self.tokens * self.layout.tensor

    @property
    def buckets(self) -> int:
        """Parts that gradients and weights travel in: one a layer of the first rank."""
        return sum(chunk.layers for chunk in self.of_rank(0))

    def _last_backward(self) -> float:
        """Seconds of the first rank's computation while its gradients become final."""
        at, own = self.layout, self.ranks[0]
        if at.schedule == "zero-bubble" and at.pipeline > 1:
            return own.weights
        v = at.stages_per_rank  # a round of P microbatches for each further chunk
        return own.backward * (1 + at.pipeline * (v - 1)) / v

    def _left_over(self, computing: float, sending: float) -> float:
        """Of equal buckets beside equal parts of a computation, one behind the other."""
        return max(sending / self.buckets, sending - computing * (1 - 1 / self.buckets))

    def _units(self, chunk: Chunk) -> list[tuple[int, Seconds]]:
        """(parameters, seconds) of what fully sharded weights are gathered by, in order."""
        m, p = self.config.model, self.layout.tensor
        layer = stages.parameters(m, Chunk(1), p), self.layer
        first = stages.parameters(m, Chunk(0, embedding=True), p), self.ends[0]
        last = stages.parameters(m, Chunk(0, head=True), p), self.ends[1]
        return [first] * chunk.embedding + [layer] * chunk.layers + [last] * chunk.head

    def _full_exposed(self, chunk: Chunk) -> tuple[float, float, float]:
        """Seconds a microbatch: gathers of the forward, of the backward, reduce-scatters."""
        units, on, copies = self._units(chunk), self.fabric, self.copies
        cost = {
            n: (
                seconds("all-gather", copies, WIDTH * n, on),
                seconds("reduce-scatter", copies, self.reduced * n, on),
            )
            for n in {n for n, _ in units}
        }
        gather, scatter = zip(*(cost[n] for n, _ in units), strict=True)
        forward = gather[0] + sum(
            max(0.0, following - unit.forward)
            for following, (_, unit) in zip(gather[1:], units, strict=False)
        )
        before, behind = (0.0, *gather[:-1]), (*scatter[1:], 0.0)
        backward = gather[-1] + sum(
            max(0.0, b + s - unit.backward)
            for b, s, (_, unit) in zip(before, behind, units, strict=True)
        )
        return forward, backward, scatter[0]

    # --- time -------------------------------------------------------------------------------------

    @cached_property
    def waiting(self) -> dict[Chunk, tuple[Seconds, Seconds]]:
        """Seconds a microbatch that a chunk waits for its tensor and its data collectives."""
        return {
            chunk: (self._tensor_seconds(chunk), self._full_seconds(chunk))
            for chunk in set(self.chunks)
        }

    def chunk_seconds(self, chunk: Chunk) -> Seconds:
        """Of one microbatch, collectives that its computation waits for included."""
        tensor, data = self.waiting[chunk]
        return stages.chunk_seconds(chunk, self.layer, self.ends) + tensor + data

    def _full_seconds(self, chunk: Chunk) -> Seconds:
        if self.layout.shard != "full" or self.layout.data == 1:
            return Seconds()
        forward, backward, scatter = self._full_exposed(chunk)
        return Seconds(forward, backward + scatter)

    def _tensor_seconds(self, chunk: Chunk) -> Seconds:
        if self.layout.tensor == 1:
            return Seconds()
        once = sum(seconds(kind, self.parts, self._rows(), self.fabric) for kind in self._kinds())
        loss = seconds("all-gather", self.parts, self._statistics(), self.fabric)
        return Seconds(
            once * (chunk.layers + chunk.embedding) + loss * chunk.head,
            once * (chunk.layers + chunk.head),
        )

    @cached_property
    def ranks(self) -> list[Seconds]:
        """Of one microbatch on each pipeline rank."""
        return [
            sum(map(self.chunk_seconds, self.of_rank(rank)), Seconds())
            for rank in range(self.layout.pipeline)
        ]

    @property
    def send_seconds(self) -> float:
        return seconds("send", self.neighbours, self.row_message(), self.fabric)

    def _sends_exposed(self) -> float:
        """Beyond the slowest rank's computation and the bubble: sends as `simulation` has them."""
        at, times = self.layout, self.microbatches
        if at.pipeline == 1:
            return 0.0
        once = self.send_seconds * sends_waited_for(at.schedule, at.pipeline, at.stages_per_rank)
        if at.schedule != "1f1b":
            return once
        way = 2 * (at.pipeline - 1) * self.send_seconds  # of P microbatches, no more are in flight
        totals = [rank.total for rank in self.ranks]
        wait = max(0.0, (sum(totals) + way) / at.pipeline - max(totals))
        return once + wait * max(0, times - at.pipeline)

    def _bubble(self) -> float:
        others = sorted(self.ranks, key=lambda rank: rank.total)[:-1]
        if self.layout.schedule == "zero-bubble":
            return sum(max(0.0, rank.forward + rank.inputs - rank.weights) for rank in others)
        return sum(rank.total for rank in others) / self.layout.stages_per_rank

    @property
    def update_seconds(self) -> float:
        """Of the optimizer on the rank with most parameters."""
        at = self.layout
        n = max(map(self.parameters, range(at.pipeline))) / (at.data if at.shard != "none" else 1)
        return (plan.ADAM_TRAFFIC + 2 * self.accumulated) * n / self.gpu.copy

    def weights_seconds(self, chunk: Chunk) -> tuple[float, float]:
        """Of a chunk's gathers and reductions once a step, a bucket a layer; none, or in its own
        seconds with shard = full.
        """
        at, buckets = self.layout, chunk.layers
        if at.data == 1 or at.shard == "full":
            return 0.0, 0.0
        n = stages.parameters(self.config.model, chunk, at.tensor) / buckets
        gather = seconds("all-gather", self.copies, WIDTH * n, self.fabric)
        reduce = seconds(self._reduction, self.copies, self.reduced * n, self.fabric)
        return buckets * gather * (at.shard == "optimizer"), buckets * reduce

    @property
    def after_seconds(self) -> float:
        """What follows the last backward and its reductions: small sums and the optimizer."""
        small = sum(found.exposed for found in self._once_a_step if found.count == 1)
        return small + self.update_seconds

    def step(self) -> Step:
        slowest = max(range(self.layout.pipeline), key=lambda rank: self.ranks[rank].total)
        chunks, times = self.of_rank(slowest), self.microbatches
        tensor, data = (
            times * sum(self.waiting[chunk][which].total for chunk in chunks) for which in (0, 1)
        )
        once: dict[str, float] = {"tensor": 0.0, "data": 0.0, "pipeline": 0.0}
        for found in self._once_a_step:
            once[found.axis] += found.exposed
        return Step(
            compute=times * self.ranks[slowest].total - tensor - data,
            optimizer=self.update_seconds,
            bubble=self._bubble(),
            tensor=tensor + once["tensor"],
            data=data + once["data"],
            pipeline=self._sends_exposed() + once["pipeline"],
        )
