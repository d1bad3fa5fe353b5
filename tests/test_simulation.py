"""The simulated pipeline: torch's own order, closed forms of its idle time, a longest path."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_proof import REPOSITORY, Mutant, assert_killed
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleavedZeroBubble,
)

from pythia_fast import plan, recommend, simulation, stages
from pythia_fast.communication import fabric
from pythia_fast.config import load
from pythia_fast.errors import InputError
from pythia_fast.estimate import Estimate
from pythia_fast.layouts import Layout
from pythia_fast.report import timeline
from pythia_fast.simulation import Operation, Stage

FILE = "pythia_fast/simulation.py"
# schedule, stages a rank
SHAPES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("zero-bubble", 1)
]  # fmt: skip
SIZES = [(2, 8), (3, 9), (4, 8), (4, 16), (8, 8), (8, 32)]  # ranks, microbatches


# --- the order ------------------------------------------------------------------------------------

TORCH = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}  # fmt: skip


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A fake process group: this process is rank 0 of 4, and nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("microbatches", [4, 8, 12])
@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
def test_order_is_torchs(schedule: str, chunks: int, microbatches: int, four_ranks: None) -> None:
    made = [
        PipelineStage(torch.nn.Linear(2, 2), stage, 4 * chunks, torch.device("cpu"))
        for stage in range(0, 4 * chunks, 4)
    ]
    multiple = schedule in ("interleaved-1f1b", "zero-bubble")
    theirs: Any = TORCH[schedule](
        made if multiple else made[0],  # type: ignore[arg-type]
        microbatches, loss_fn=lambda output, target: (output - target).sum(),
    ).pipeline_order  # fmt: skip
    for rank, ours in enumerate(simulation.order(schedule, 4, microbatches, chunks)):
        wanted = [
            Operation(a.stage_index, a.computation_type.value, a.microbatch_index)
            for a in theirs[rank]
            if a is not None and a.computation_type.value in "FBIW"
        ]
        if schedule == "1f1b" and rank == 3 and wanted[0].microbatch == 1:
            # torch prints the last rank's forwards from 1; what it runs begins at 0
            wanted = [o._replace(microbatch=o.microbatch - (o.kind == "F")) for o in wanted]
        assert ours == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("2f2b", 4, 8), "'2f2b' is none of gpipe"),
        (("1f1b", 4, 8, 2), "takes one stage a rank, not 2"),
        (("zero-bubble", 4, 9), "9 microbatches are no whole rounds of 4 on 4 ranks"),
    ],
)
def test_orders_that_there_are_not(arguments: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        simulation.order(*arguments)


# --- closed forms ---------------------------------------------------------------------------------


def idle(schedule: str, P: int, v: int, F: int, I: int, W: int) -> Fraction:
    """Of each rank, from the papers: GPipe, PipeDream-2BW and Megatron's interleaving, ZB-H1."""
    if schedule == "zero-bubble":
        return Fraction((P - 1) * (F + I - W))
    return Fraction((P - 1) * (F + I + W), v)


def run(module: ModuleType, schedule: str, P: int, M: int, v: int, send: Any = 0,
        costs: tuple[int, int, int] = (6, 6, 6)) -> Any:  # fmt: skip
    stage = module.Stage(*(Fraction(cost, v) for cost in costs))
    return module.simulate(module.order(schedule, P, M, v), [stage] * (P * v), send)


@pytest.mark.parametrize(("P", "M"), SIZES)
@pytest.mark.parametrize(("schedule", "v"), SHAPES)
def test_bubble_is_the_closed_form(schedule: str, v: int, P: int, M: int) -> None:
    """Exactly, on every rank; and the share that the formulas of the literature give."""
    costs = (6, 6, 6) if schedule == "zero-bubble" else (3, 5, 4)
    line = run(simulation, schedule, P, M, v, costs=costs)
    wanted = idle(schedule, P, v, *costs)
    assert [line.idle(rank) for rank in range(P)] == [wanted] * P
    assert line.end == M * sum(costs) + wanted
    if schedule != "zero-bubble":
        assert line.bubble == Fraction(P - 1, v * M + P - 1)


@pytest.mark.parametrize(("P", "M"), SIZES)
@pytest.mark.parametrize(("schedule", "v"), SHAPES)
def test_activations_in_flight(schedule: str, v: int, P: int, M: int) -> None:
    """Counted in the lists; 1f1b's is min(P - s, M), gpipe's M, ZB-H1's that of 1f1b's first."""
    peaks = [simulation.peak(operations) for operations in simulation.order(schedule, P, M, v)]
    closed = {
        "gpipe": [M] * P,
        "1f1b": [min(P - s, M) for s in range(P)],
        "zero-bubble": [min(P, M)] * P,
    }
    if schedule in closed:
        assert peaks == closed[schedule]
    assert peaks == [stages.in_flight(schedule, s, P, M, v) for s in range(P)]


@pytest.mark.parametrize(("P", "M"), SIZES)
@pytest.mark.parametrize(("schedule", "v"), SHAPES)
def test_sends_that_a_step_waits_for(schedule: str, v: int, P: int, M: int) -> None:
    free, sent = (run(simulation, schedule, P, M, v, Fraction(t, 10)) for t in (0, 1))
    waited = stages.sends_waited_for(schedule, P, v)
    if schedule == "zero-bubble" and M < 2 * P:
        assert sent.end - free.end <= Fraction(1, 10) * waited
        return
    steady = Fraction(2 * (P - 1) * (M - P), P) if schedule == "1f1b" else 0
    assert sent.end - free.end == Fraction(1, 10) * (waited + steady)


# --- any costs: the longest path ------------------------------------------------------------------


def longest_path(
    orders: list[list[Operation]], costs: list[Stage], send: float
) -> dict[Operation, float]:
    """End of each operation by its definition: after all that it needs, recursively."""
    ranks, last = len(orders), len(costs) - 1
    before = {o: ops[i - 1] if i else None for ops in orders for i, o in enumerate(ops)}

    @cache
    def end(o: Operation) -> float:
        stage, kind, m = o
        needs = [] if before[o] is None else [end(before[o])]  # type: ignore[arg-type]
        if kind == "F" and stage:
            needs.append(end(Operation(stage - 1, "F", m)) + send)
        elif kind in "BI" and stage < last:
            needs.append(end(Operation(stage + 1, kind, m)) + send)
        elif kind in "BI":
            needs.append(end(Operation(stage, "F", m)))
        elif kind == "W":
            needs.append(end(Operation(stage, "I", m)))
        c = costs[stage]
        took = {"F": c.forward, "I": c.inputs, "W": c.weights, "B": c.inputs + c.weights}
        return max(needs, default=0.0) + took[kind]

    assert ranks > 1
    return {o: end(o) for ops in orders for o in ops}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("schedule", "v"), SHAPES)
def test_any_costs_end_at_the_longest_path(schedule: str, v: int, seed: int) -> None:
    draw = random.Random(seed)
    P, M = draw.choice([(2, 4), (3, 6), (4, 8)])
    costs = [Stage(*(draw.uniform(0.1, 3) for _ in range(3))) for _ in range(P * v)]
    orders, send = simulation.order(schedule, P, M, v), draw.uniform(0, 1)
    found = {
        Operation(e.stage, e.kind, e.microbatch): e.end
        for e in simulation.simulate(orders, costs, send).events
    }
    assert found == pytest.approx(longest_path(orders, costs, send))


def test_a_circle_is_found() -> None:
    orders = [[Operation(0, "B", 0), Operation(0, "F", 0)], [Operation(1, "F", 0)]]
    with pytest.raises(ValueError, match="wait for one another"):
        simulation.simulate(orders, [Stage(1, 1, 1)] * 2)


# --- overlap --------------------------------------------------------------------------------------


def overlapped(module: ModuleType) -> list[tuple[str, int, int]]:
    """Two buckets: gathered at 3 and 6, forward 2 + 2; backward 6, each bucket reduced in 5."""
    stage = module.Stage(4, 3, 3, gather=6, reduce=10, buckets=2)
    line = module.simulate(module.order("1f1b", 1, 1), [stage], update=1)
    return [(e.kind, e.start, e.end) for e in line.events]


BY_HAND = [("gather", 0, 6), ("F", 0, 8), ("B", 8, 14), ("reduce", 11, 21), ("update", 21, 22)]


def test_communication_beside_computation() -> None:
    assert overlapped(simulation) == BY_HAND


@pytest.mark.parametrize("schedule", simulation.SCHEDULES)
def test_estimates_agree_with_the_simulation(schedule: str) -> None:
    """Closed forms of unequal stages are approximate: within 7 %, half of them within 1 %."""
    flags = ["--recipe", "modern", "--parallel.schedule", schedule]
    c = load(REPOSITORY / "configs/pythia-12b.toml", flags)
    layouts = [
        at for at in recommend.candidates(c, 64)
        if at.schedule == schedule and at.pipeline > 1 and at.rows in (2, 4) and at.tensor <= 2
        and at.pipeline <= 1024 // (at.data * at.rows) <= 64
    ]  # fmt: skip
    assert len(layouts) >= 20
    errors = []
    for at in random.Random(0).sample(layouts, 20):
        estimate = Estimate(c, at, plan.GPUS["H100"], fabric("H100"))
        errors.append(abs(estimate.step().total / simulation.of_layout(estimate).end - 1))
    assert max(errors) < 0.07 and sorted(errors)[10] < 0.01


# --- the figure -----------------------------------------------------------------------------------


def test_timeline(tmp_path: Path) -> None:
    flags = "--recipe modern --parallel.pipeline 4 --train.micro_batch_size 8".split()
    c = load(REPOSITORY / "configs/pythia-1.4b.toml", flags)
    found = timeline.data(c, 32, "A100")
    assert [panel["title"].partition(":")[0] for panel in found["panels"]] == [
        "gpipe", "1f1b", "interleaved-1f1b, 3 stages a rank", "zero-bubble"
    ]  # fmt: skip
    layout = Layout(8, 1, 4, False, "1f1b", 1, "optimizer", 8)
    estimate = Estimate(c, layout, plan.GPUS["A100"], fabric("A100"))
    wanted = 1e3 * simulation.of_layout(estimate).end
    assert max(event[5] for event in found["panels"][1]["events"]) == pytest.approx(wanted)
    assert f"{wanted:,.0f} ms" in found["panels"][1]["title"]
    timeline.save(found, tmp_path / "step.png")
    assert [path.name for path in tmp_path.iterdir()] == ["step.png"]
    for flags in (["--parallel.pipeline", "1"], ["--parallel.pipeline", "5"]):
        with pytest.raises(InputError):
            timeline.data(load(REPOSITORY / "configs/pythia-1.4b.toml", flags), 32, "A100")


# --- mutants --------------------------------------------------------------------------------------


def check(module: ModuleType) -> None:
    for schedule, v in SHAPES:
        costs = (6, 6, 6) if schedule == "zero-bubble" else (3, 5, 4)
        line = run(module, schedule, 4, 8, v, costs=costs)
        assert line.idle(0) == idle(schedule, 4, v, *costs), schedule
        peaks = [module.peak(operations) for operations in module.order(schedule, 4, 8, v)]
        assert peaks == [stages.in_flight(schedule, s, 4, 8, v) for s in range(4)], schedule
    waits = [run(module, "interleaved-1f1b", 4, 8, 2, send).end for send in (0, 1)]
    assert waits[1] - waits[0] == 2 * (2 * 4 - 1)
    assert overlapped(module) == BY_HAND


MUTANTS = [
    Mutant("one forward too few to warm up", FILE, '"1f1b": last,', '"1f1b": max(0, last - 1),'),
    Mutant("half the warm-up of interleaving", FILE, "rounded + 2 * last", "rounded + last"),
    Mutant("weights at once", FILE, "delay = rank if halves", "delay = 0 if halves"),
    Mutant("backwards wait for no later stage", FILE, '(stage + 1, "I", m)', '(stage, "F", m)'),
    Mutant("sends are free", FILE, "arrived + (send if ranks > 1 else 0)", "arrived"),
    Mutant("whole backward at half its cost", FILE, '"B": stage.inputs + stage.weights', '"B": stage.inputs'),
    Mutant("activations freed before their weights' half", FILE, 'held -= operation.kind == ("W" if halves else "B")', 'held -= operation.kind in "IB"'),
    Mutant("update beside the reductions", FILE, "max(free[rank], reduced[rank])", "free[rank]"),
    Mutant("forward does not wait for weights", FILE, "time = max(time, end) + stage", "time = time + stage"),
]  # fmt: skip


def test_check() -> None:
    check(simulation)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)
