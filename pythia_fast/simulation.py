"""A discrete-event simulation of one optimizer step on a pipeline.

`order` lists what each rank runs, as torch.distributed.pipelining does; `simulate` runs the lists:
an operation starts when its rank is free and what it needs has arrived. Times are of any number
type, so equal costs in whole numbers give exact bubbles. Closed forms, sends free, for P ranks, M
microbatches, v chunks a rank, and F, I, W seconds of a rank's forward and its backward's halves:

    gpipe, 1f1b        idle (P - 1)(F + I + W)      share of the step (P - 1)/(M + P - 1)
    interleaved-1f1b   idle (P - 1)(F + I + W)/v    share (P - 1)/(v·M + P - 1), P divides M
    zero-bubble        idle (P - 1)(F + I - W)      ZB-H1, W <= I and W <= F

Sources: GPipe, arXiv 1811.06965; 1F1B and interleaving, arXiv 2104.04473; ZB-H1, arXiv 2401.10241.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pythia_fast.errors import InputError
from pythia_fast.stages import round_of

if TYPE_CHECKING:
    from pythia_fast.estimate import Estimate

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble")


class Operation(NamedTuple):
    """kind: F forward, B whole backward, I and W its halves for inputs and for weights."""

    stage: int  # of the whole pipeline: rank + ranks·chunk
    kind: str
    microbatch: int


# --- lists of operations --------------------------------------------------------------------------


def order(
    schedule: str, ranks: int, microbatches: int, chunks: int = 1
) -> list[list[Operation]]:  # fmt: skip
    """What each rank runs, in order. chunks: stages of a rank, for interleaved-1f1b.

    Raises InputError for a schedule that is not known, or whose rounds are not whole.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if chunks != 1 and schedule != "interleaved-1f1b":
        raise InputError(f"schedule {schedule!r} takes one stage a rank, not {chunks}")
    rounded = round_of(ranks, microbatches)
    if schedule in ("interleaved-1f1b", "zero-bubble") and microbatches % rounded:
        raise InputError(
            f"{microbatches} microbatches are no whole rounds of {rounded} on {ranks} ranks"
        )
    return [_of_rank(schedule, rank, ranks, microbatches, chunks) for rank in range(ranks)]


def _of_rank(
    schedule: str, rank: int, ranks: int, microbatches: int, chunks: int
) -> list[Operation]:
    rounded, last = round_of(ranks, microbatches), ranks - 1 - rank
    # (chunk, microbatch) of the n-th forward: a round of microbatches through each chunk in turn
    turns = sorted(
        ((chunk, m) for m in range(microbatches) for chunk in range(chunks)),
        key=lambda turn: (turn[1] // rounded, turn[0], turn[1]),
    )
    forward = [Operation(rank + ranks * chunk, "F", m) for chunk, m in turns]
    back = [(rank + ranks * (chunks - 1 - chunk), m) for chunk, m in turns]
    halves = schedule == "zero-bubble"
    backward = [Operation(stage, "I" if halves else "B", m) for stage, m in back]
    warmup = {
        "gpipe": microbatches,
        "1f1b": last,
        "zero-bubble": last,
        "interleaved-1f1b": (chunks - 1) * rounded + 2 * last,
    }[schedule]
    warmup = min(warmup, len(forward))
    delay = rank if halves else len(back)  # backwards before the first weights' half
    found = forward[:warmup]
    for n, operation in enumerate(backward):
        found += [*forward[warmup + n : warmup + n + 1], operation]
        if n >= delay:
            stage, m = back[n - delay]
            found.append(Operation(stage, "W", m))
    if halves:
        found += [Operation(stage, "W", m) for stage, m in back[max(0, len(back) - delay) :]]
    return found


def peak(operations: Sequence[Operation]) -> int:
    """Forwards whose last backward (or weights' half) has not run, at most."""
    halves = any(operation.kind == "W" for operation in operations)
    held = most = 0
    for operation in operations:
        held += operation.kind == "F"
        most = max(most, held)
        held -= operation.kind == ("W" if halves else "B")
    return most


# --- running them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Seconds (or any unit) of one microbatch on one stage.

    gather, reduce: of its weights before the first forward and of its gradients after the last
    backward, in `buckets` equal parts that overlap with that forward and that backward.
    """

    forward: Any
    inputs: Any
    weights: Any
    gather: Any = 0
    reduce: Any = 0
    buckets: int = 1


class Event(NamedTuple):
    """kind: those of `Operation`, or "gather", "reduce", "update"."""

    rank: int
    stage: int
    kind: str
    microbatch: int
    start: Any
    end: Any


@dataclass(frozen=True)
class Timeline:
    events: list[Event]
    ranks: int

    @property
    def end(self) -> Any:
        return max(event.end for event in self.events)

    def busy(self, rank: int) -> Any:
        """Of computation."""
        mine = (e for e in self.events if e.rank == rank and e.kind in "FBIW")
        return sum(e.end - e.start for e in mine)

    def idle(self, rank: int) -> Any:
        """From the beginning of the step to its end, while the rank computes nothing."""
        return self.end - self.busy(rank)

    @property
    def bubble(self) -> Any:
        """Idle share of all ranks."""
        idle = sum(self.idle(rank) for rank in range(self.ranks))
        return idle / (self.ranks * self.end)


def simulate(
    orders: Sequence[Sequence[Operation]], stages: Sequence[Stage], send: Any = 0, update: Any = 0
) -> Timeline:
    """send: of one microbatch between neighbouring stages. update: of the optimizer on each rank.

    Raises ValueError where the lists wait for one another in a circle.
    """
    ranks = len(orders)
    done: dict[tuple[int, str, int], Any] = {}  # (stage, F or I, microbatch) -> end
    place, free = [0] * ranks, [0] * ranks
    remaining = {
        (r, s): sum(o.stage == s and o.kind != "F" for o in orders[r])
        for r in range(ranks)
        for s in {o.stage for o in orders[r]}
    }
    events: list[Event] = []
    gathers, reduced = _gathers(orders, stages, events), [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, operations in enumerate(orders):
            while place[rank] < len(operations):
                operation = operations[place[rank]]
                ready = _ready(operation, done, len(stages), ranks, send)
                if ready is None:
                    break
                stage = stages[operation.stage]
                start = max(free[rank], ready)
                if operation.kind == "F" and operation.microbatch == 0:
                    end = _overlapped(start, stage, gathers[operation.stage])
                else:
                    end = start + _duration(stage, operation.kind)
                events.append(Event(rank, operation.stage, operation.kind,
                                    operation.microbatch, start, end))  # fmt: skip
                if operation.kind in "FBI":
                    key = "F" if operation.kind == "F" else "I"
                    done[operation.stage, key, operation.microbatch] = end
                free[rank], place[rank], moved = end, place[rank] + 1, True
                if operation.kind != "F":
                    remaining[rank, operation.stage] -= 1
                    if not remaining[rank, operation.stage] and stage.reduce:
                        reduced[rank] = _reduce(events, stage, start, end, reduced[rank])
    if any(place[r] < len(orders[r]) for r in range(ranks)):
        raise ValueError("the lists of operations wait for one another")
    if update:
        for rank in range(ranks):
            start = max(free[rank], reduced[rank])
            events.append(Event(rank, rank, "update", 0, start, start + update))
    return Timeline(events, ranks)


def _ready(
    operation: Operation, done: dict[tuple[int, str, int], Any], stages: int, ranks: int, send: Any
) -> Any:
    """When what it needs has arrived; None where that is not known yet."""
    stage, kind, m = operation
    if kind == "W":
        return done.get((stage, "I", m))
    if kind == "F":
        needed, begins = (stage - 1, "F", m), stage == 0
    else:
        needed, begins = (stage + 1, "I", m), stage == stages - 1
    if begins:
        return 0 if kind == "F" else done.get((stage, "F", m))
    arrived = done.get(needed)
    return None if arrived is None else arrived + (send if ranks > 1 else 0)


def _duration(stage: Stage, kind: str) -> Any:
    return {
        "F": stage.forward, "I": stage.inputs, "W": stage.weights,
        "B": stage.inputs + stage.weights,
    }[kind]  # fmt: skip


def _gathers(
    orders: Sequence[Sequence[Operation]], stages: Sequence[Stage], events: list[Event]
) -> dict[int, list[Any]]:
    """Ends of each stage's parts, from the beginning of the step, a rank's stages in turn."""
    ends: dict[int, list[Any]] = {}
    for rank, operations in enumerate(orders):
        time: Any = 0
        for stage in sorted({operation.stage for operation in operations}):
            own = stages[stage]
            part = own.gather / own.buckets if own.gather else 0
            ends[stage] = [time + part * (n + 1) for n in range(own.buckets)]
            if part:
                events.append(Event(rank, stage, "gather", 0, time, ends[stage][-1]))
            time = ends[stage][-1]
    return ends


def _overlapped(start: Any, stage: Stage, arrived: Sequence[Any]) -> Any:
    """End of the first forward: each part of it waits for its part of the weights."""
    if not stage.gather:
        return start + stage.forward
    time = start
    for end in arrived:
        time = max(time, end) + stage.forward / stage.buckets
    return time


def _reduce(events: list[Event], stage: Stage, start: Any, end: Any, free: Any) -> Any:
    """End of the gradients' parts: each becomes ready with its part of the last backward."""
    part, time = stage.reduce / stage.buckets, free
    first = None
    for n in range(stage.buckets):
        begin = max(time, start + (end - start) * (n + 1) / stage.buckets)
        first = begin if first is None else first
        time = begin + part
    last = events[-1]
    events.append(Event(last.rank, last.stage, "reduce", 0, first, time))
    return time


# --- a layout -------------------------------------------------------------------------------------


def of_layout(estimate: Estimate) -> Timeline:
    """One step of a layout with the costs of its estimate, in seconds."""
    at = estimate.layout
    orders = order(at.schedule, at.pipeline, estimate.microbatches, at.stages_per_rank)
    stages = []
    for chunk in estimate.chunks:
        own = estimate.chunk_seconds(chunk)
        gather, reduce = estimate.weights_seconds(chunk)
        stages.append(Stage(own.forward, own.inputs, own.weights, gather, reduce, chunk.layers))
    return simulate(orders, stages, estimate.send_seconds, estimate.after_seconds)
