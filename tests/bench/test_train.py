"""The training benchmark on the CPU at tiny size, under a clock on which a step takes 4 ms."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import count

import pytest
import torch
from fake_timing import FakeClock

from bench import bench_profile, bench_train, train_peers
from bench.nvml import Sample
from bench.record import Row
from bench.train_peers import IMPLEMENTATIONS, Stepper
from pythia_fast import train

TINY = {"size": "tiny", "rows": 4, "positions": 16, "compute": "fp32", "seconds": 0.02}


def measure(impl: str = "ours", **more: object) -> Row:
    ticks = count()

    def read() -> Sample:
        second = float(next(ticks))
        return Sample(second, power_w=500.0, clock_mhz=1700.0, energy_j=100 * second)

    arguments = {**TINY, "clock": FakeClock(), "read": read, **more}
    (row,) = bench_train.measure(impl=impl, **arguments)  # type: ignore[arg-type]
    return row


def test_figures_of_a_row() -> None:
    row = measure()
    assert row["ms"] == [4.0] * 5 and row["tokens"] == 64
    assert row["tokens_per_s"] == pytest.approx(64 / 4e-3)
    assert row["power_w"] == 500.0 and row["clock_mhz"] == 1700.0
    assert row["joule_per_token"] >= 100 / (5 * 64)  # at least one tick of 100 J passed
    assert row["loss_last"] < row["loss_first"] and row["micro_batch_size"] == 4
    assert row["peak_gb"] > 0 and row["exhausted_at_rows"] == [] and row.get("status") is None


def test_ours_is_the_trainers_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a copy of it."""
    steps = []
    step = train.Trainer.train_step
    monkeypatch.setattr(
        train.Trainer, "train_step", lambda self, rows: steps.append(rows.shape) or step(self, rows)
    )
    clock = FakeClock()
    measure(clock=clock)
    assert len(steps) == bench_train.WARMUP + clock.steps == 3 + 1 + 5
    assert set(steps) == {(4, 17)}


def test_implementations_agree_on_the_first_loss() -> None:
    losses = {impl: measure(impl)["loss_first"] for impl in ("ours", "eager", "transformers")}
    assert max(losses.values()) - min(losses.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["compile", "transformers-compile"])
def test_compiled_implementations(impl: str) -> None:
    row = measure(impl)
    assert row["loss_first"] == pytest.approx(measure()["loss_first"], abs=1e-5)


def test_a_peer_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def erf(config, device):  # type: ignore[no-untyped-def]
        model = replace(config.model, rotary_pct=0.5)
        return train_peers.on_trainer(replace(config, model=model), device, "reference")

    monkeypatch.setitem(IMPLEMENTATIONS, "eager", erf)
    row = measure("eager")
    assert row["status"] == "wrong" and "where the reference model has" in row["reason"]
    assert "ms" not in row


def test_a_peer_that_does_not_learn_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(config, device):  # type: ignore[no-untyped-def]
        stepper = train_peers.on_trainer(config, device, "reference")
        return Stepper(stepper.model, lambda rows: stepper.loss(rows).detach(), stepper.loss)

    monkeypatch.setitem(IMPLEMENTATIONS, "eager", idle)
    row = measure("eager")
    assert row["status"] == "wrong" and "did not fall" in row["reason"]


def test_a_peer_that_is_absent_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(config, device):  # type: ignore[no-untyped-def]
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setitem(IMPLEMENTATIONS, "transformers", absent)
    row = measure("transformers")
    assert row["status"] == "skipped" and "transformers" in row["reason"]


def exhausted_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = IMPLEMENTATIONS["ours"]

    def limited(config, device):  # type: ignore[no-untyped-def]
        if config.train.micro_batch_size > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        return make(config, device)

    monkeypatch.setitem(IMPLEMENTATIONS, "ours", limited)


def test_the_largest_microbatch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    exhausted_above(1, monkeypatch)
    row = measure()
    assert row["exhausted_at_rows"] == [4, 2] and row["micro_batch_size"] == 1
    assert row["tokens"] == 64  # the same batch


def test_out_of_memory_is_recorded_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    exhausted_above(0, monkeypatch)
    row = measure()
    assert row["status"] == "out of memory" and row["exhausted_at_rows"] == [4, 2, 1]
    assert row["parameters"] == 164_096 and row["reason"].startswith("164,096 parameters: ")
    assert "9 GiB" in row["reason"] and "\n" not in row["reason"]


def test_cases_take_turns_in_opposite_order() -> None:
    impls = bench_train.GPU_IMPLS
    first, second = (
        list(bench_train.cases(["70m"], impls, turn, on_gpu=True)) for turn in range(2)
    )
    assert [c.head["impl"] for c in first] == [c.head["impl"] for c in second][::-1]
    assert {c.name for c in first} == {c.name for c in second}
    assert {c.what["rows"] * c.what["positions"] for c in first} == {65536}
    for case in (*first, *bench_profile.cases(["12b"], on_gpu=True)):
        module = bench_profile if case.head["bench"] == "profile" else bench_train
        inspect.signature(module.measure).bind(**case.what)


def test_sizes_are_those_of_the_suite() -> None:
    from bench.op import SIZES

    assert sorted(bench_train.ALL_SIZES) == sorted(SIZES)
    assert set(bench_train.STEP_TOKENS) <= set(SIZES)


# --- profile --------------------------------------------------------------------------------------


def test_kernels_and_the_gaps_between_them() -> None:
    """0-10 a, 8-20 b (overlap), gap 5, 25-30 a, 26-27 c (inside), gap 10, 40-41 b; microseconds."""
    kinds = [("a", 0, 10), ("b", 8, 20), ("a", 25, 30), ("c", 26, 27), ("b", 40, 41)]
    row = bench_profile.kernels([bench_profile.Interval(*kind) for kind in reversed(kinds)])
    assert (row["span_ms"], row["busy_ms"], row["idle_ms"]) == (0.041, 0.026, 0.015)
    assert (row["calls"], row["gaps"]) == (5, 2)
    assert row["longest_gaps"] == [
        {"us": 10.0, "after": "a", "before": "b"}, {"us": 5.0, "after": "b", "before": "a"},
    ]  # fmt: skip
    assert row["by_name"][0] == {"name": "a", "calls": 2, "ms": 0.015}
    assert [k["name"] for k in row["by_name"]] == ["a", "b", "c"] and row["other_ms"] == 0
    assert bench_profile.kernels([])["status"] == "error"


def test_profile_of_a_step_on_the_cpu() -> None:
    (row,) = bench_profile.measure("tiny", "ours", 4, 16, "fp32")
    names = {k["name"] for k in row["by_name"]}
    assert {"aten::mm", "aten::_fused_adamw_"} <= names
    listed = sum(k["ms"] for k in row["by_name"])
    assert listed + row["other_ms"] == pytest.approx(row["busy_ms"], rel=1e-3)
