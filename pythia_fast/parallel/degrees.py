"""How many processes share what, checked in one place. Imports no torch: a plan asks too.

Ranks are numbered pipeline outermost, then data, tensor innermost, as in GPT-NeoX: the tensor
processes of one copy of a layer are neighbours, on the fastest links.

    rank = (stage·D + copy)·P + part        D data, P tensor
"""

from __future__ import annotations

from dataclasses import dataclass

from pythia_fast.config import Config
from pythia_fast.errors import InputError

AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Degrees:
    """Processes along each axis; their product is the number of processes."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(stage, copy, part) of a rank."""
        rest, part = divmod(rank, self.tensor)
        return *divmod(rest, self.data), part


def degrees(c: Config, world: int) -> Degrees:
    """The degrees of `c.parallel` on `world` processes; data = -1 takes what is left.

    Raises InputError naming the two numbers that do not fit.
    """
    p, m, t = c.parallel, c.model, c.train
    for name in ("tensor", "pipeline", "stages_per_rank"):
        if getattr(p, name) < 1:
            raise InputError(f"parallel.{name} = {getattr(p, name)} must be positive")
    if p.data < 1 and p.data != -1:
        raise InputError(f"parallel.data = {p.data}: expected a positive number, or -1")
    inner = p.tensor * p.pipeline
    data = max(world // inner, 1) if p.data == -1 else p.data
    if data * inner != world:
        product = f"parallel.tensor = {p.tensor} times parallel.pipeline = {p.pipeline}"
        if p.data != -1:
            product = f"parallel.data = {p.data} times {product}"
        verb = "does not divide" if p.data == -1 else "is not"
        raise InputError(f"{product} {verb} the {world} processes of this launch")
    for count, what in (
        (m.heads, "model.heads"), (m.vocab_size, "model.vocab_size"),
        *([(c.data.seq_len, "data.seq_len")] if p.sequence else []),
    ):  # fmt: skip
        if count % p.tensor:
            raise InputError(f"{what} = {count} is not divisible by parallel.tensor = {p.tensor}")
    if p.sequence and p.tensor == 1:
        raise InputError("parallel.sequence = true needs parallel.tensor > 1, which is 1")
    stages = p.pipeline * p.stages_per_rank
    if m.layers < stages:
        raise InputError(f"model.layers = {m.layers} are fewer than the {stages} pipeline stages")
    if t.batch_size % (data * t.micro_batch_size):
        raise InputError(
            f"train.batch_size = {t.batch_size} is not divisible by parallel.data = {data} times "
            f"train.micro_batch_size = {t.micro_batch_size}"
        )
    if c.precision.gradients != "fp32" and data not in (1, c.precision.sum_ranks):
        raise InputError(
            f"parallel.data = {data} is not precision.sum_ranks = {c.precision.sum_ranks}: 16-bit "
            "gradients add up over as many processes as ranks, or all on one; --recipe modern adds "
            "them in fp32, over any number"
        )
    if p.pipeline > 1 and c.precision.ranks > data:
        raise InputError(
            f"precision.sum_ranks = {c.precision.sum_ranks} with parallel.pipeline = {p.pipeline} "
            f"needs parallel.data = {c.precision.sum_ranks}, not {data}: a process adds up one rank"
        )
    if p.shard == "full" and data > 1:
        _check_full(c, data)
    if p.pipeline > 1:
        _check_schedule(c, t.batch_size // (data * t.micro_batch_size))
    return Degrees(p.pipeline, data, p.tensor)


def _check_full(c: Config, data: int) -> None:
    """FSDP2 splits rows of what a tensor-parallel process holds, evenly, and sums in fp32."""
    p, m = c.parallel, c.model
    if p.pipeline > 1:
        raise InputError(
            f"parallel.shard = 'full' with parallel.pipeline = {p.pipeline} is not there yet: "
            "choose shard = 'optimizer'"
        )
    if c.optimizer.states == "lean":
        raise InputError("optimizer.states = 'lean' does not go with parallel.shard = 'full'")
    if c.precision.gradients != "fp32":
        raise InputError(
            f"parallel.shard = 'full' sums gradients in fp32, not precision.gradients = "
            f"{c.precision.gradients!r}"
        )
    for name, rows in (("model.vocab_size", m.vocab_size), ("model.hidden", m.hidden)):
        if rows % (p.tensor * data):
            raise InputError(
                f"{name} = {rows} is not divisible by parallel.data = {data} times "
                f"parallel.tensor = {p.tensor}, which parallel.shard = 'full' needs"
            )


def _check_schedule(c: Config, microbatches: int) -> None:
    """What the schedules of torch.distributed.pipelining ask for."""
    p = c.parallel
    single = p.schedule in ("gpipe", "1f1b")
    if single and p.stages_per_rank > 1:
        raise InputError(
            f"parallel.stages_per_rank = {p.stages_per_rank} needs parallel.schedule = "
            f"'interleaved-1f1b' or 'zero-bubble', not {p.schedule!r}"
        )
    rounds = max(microbatches // p.pipeline, 1)  # in which chunks take turns
    if not single and microbatches % rounds:
        raise InputError(
            f"{microbatches} microbatches a step are not {rounds} equal rounds of at least "
            f"parallel.pipeline = {p.pipeline}, which {p.schedule!r} needs"
        )
