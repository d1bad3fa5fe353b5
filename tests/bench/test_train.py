"""The training benchmark on the CPU at tiny size, under a clock on which a step takes 4 ms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from fake_timing import FakeClock

from bench import bench_profile, bench_train, train_check, train_peers
from bench.nvml import Sample
from bench.record import Row
from bench.train_peers import IMPLEMENTATIONS, Stepper
from pythia_fast import train
from pythia_fast.config import flatten

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
    ours = bench_train.WARMUP + clock.steps
    assert len(steps) == ours + train_check.STEPS == 3 + 1 + 5 + 2
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
        return replace(stepper, step=lambda rows: (stepper.loss(rows).detach(), torch.ones(())))

    monkeypatch.setitem(IMPLEMENTATIONS, "eager", idle)
    row = measure("eager")
    assert row["status"] == "wrong" and "did not fall" in row["reason"]


def spoilt(spoil: Callable[[Stepper], object], impl: str, monkeypatch: pytest.MonkeyPatch) -> Row:
    """The row of an implementation to whose model something was done."""
    make = IMPLEMENTATIONS[impl]

    def made(config, device):  # type: ignore[no-untyped-def]
        stepper = make(config, device)
        spoil(stepper)
        return stepper

    monkeypatch.setitem(IMPLEMENTATIONS, impl, made)
    return measure(impl)


def scaled(name: str, factor: float) -> Callable[[Stepper], object]:
    """The gradient of one parameter times factor, in every backward pass."""
    return lambda s: s.model.get_parameter(name).register_hook(lambda g: g * factor)


def without_dq(s: Stepper) -> object:
    weight = s.model.get_parameter("gpt_neox.layers.1.attention.query_key_value.weight")

    def hook(g: torch.Tensor) -> torch.Tensor:
        packed = g.unflatten(0, (4, 3, -1)).clone()
        packed[:, 0] = 0
        return packed.view_as(g)

    return weight.register_hook(hook)


NORM = "gpt_neox.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (scaled(NORM, 0.0), NORM),  # 64 of 164,096 elements
        (scaled("gpt_neox.layers.1.mlp.dense_4h_to_h.bias", 0.5), "dense_4h_to_h.bias"),
        (without_dq, "query_key_value.weight (q)"),
    ],
    ids=["one gradient is zero", "one is halved", "dq is zero"],
)
@pytest.mark.parametrize("impl", ["ours", "transformers"])
def test_a_wrong_gradient_is_found(spoil, where: str, impl: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Each of these learns the repeated batch, and its first loss is right."""
    row = spoilt(spoil, impl, monkeypatch)
    assert row["status"] == "wrong" and where in row["reason"] and "ms" not in row


def test_what_the_step_makes_of_gradients_is_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved in the optimizer alone: Adam does not see it, the norm does; half the rate is seen in
    the second step; and the loss that a step returns must be its own."""

    def halved(config, device):  # type: ignore[no-untyped-def]
        s = train_peers.on_trainer(config, device, "reference")
        return replace(s, step=lambda rows: (lambda loss, norm: (loss, norm / 2))(*s.step(rows)))

    def slow(config, device):  # type: ignore[no-untyped-def]
        s = train_peers.on_trainer(config, device, "reference")
        small = replace(config.optimizer, lr=config.optimizer.lr / 2, min_lr=0.0)
        step = train_peers.on_trainer(replace(config, optimizer=small), device, "reference").step
        return replace(s, step=step)

    def another(config, device):  # type: ignore[no-untyped-def]
        s = train_peers.on_trainer(config, device, "reference")
        return replace(s, step=lambda rows: (lambda loss, norm: (loss * 1.1, norm))(*s.step(rows)))

    norms = "gradient norms"
    for wrong, said in ((halved, norms), (slow, norms), (another, "losses")):
        monkeypatch.setitem(IMPLEMENTATIONS, "eager", wrong)
        row = measure("eager")
        assert row["status"] == "wrong" and row["reason"].startswith(said)


def test_every_precision_keeps_its_band() -> None:
    for impl, compute in (("eager", "bf16"), ("transformers", "bf16"), (bench_train.V1, "fp16")):
        row = measure(impl, compute=compute)
        band = train_check.BANDS[compute]
        assert row.get("status") is None, row
        assert 0 < row["grad_err"] < band.gradient / 4 and row["norm_err"] < band.norm / 4
        assert row["attention"] == "flash_attention"  # torch's, on a CPU


def test_gradients_of_fused_blocks_are_read_where_they_add_up() -> None:
    """Autograd has none of theirs: the same names and values as the reference's."""
    config = bench_train.configuration("tiny", 2, 8, "fp32")
    model = replace(config.model, heads=2, layers=1, vocab_size=50)  # head dim 32: the kernels'
    config = replace(config, model=model)
    device = torch.device("cpu")
    rows = bench_train.synthetic_batch(config, device)
    found = {}
    for backend in ("triton", "reference"):
        stepper = train_peers.on_trainer(config, device, backend)  # type: ignore[arg-type]
        found[backend] = train_check.gradients(stepper, rows)
        again = train_check.gradients(stepper, rows)  # nothing is left of the first
        assert all(torch.equal(g, found[backend][n]) for n, g in again.items())
    assert found["triton"].keys() == found["reference"].keys()
    for name, gradient in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], gradient, rtol=1e-4, atol=1e-6)


def test_variants_of_ours_say_what_they_change() -> None:
    for impl, keys in train_peers.VARIANTS.items():
        assert impl in bench_train.GPU_IMPLS and impl.startswith("ours ")
        changed = {k: v for k, v in keys.items() if k != "recipe"}
        config = bench_train.configuration("12b", 8, 2048, "bf16", "", changed)
        assert all(flatten(config)[k] == v for k, v in changed.items())
        assert config.kernels.recompute == "selective"


def test_the_published_recipe_is_measured_too() -> None:
    """fp16 gradients, sums over ranks, loss scale: not what the peers' row is."""
    case = next(
        c for c in bench_train.cases(["410m"], bench_train.GPU_IMPLS, 0, True)
        if c.head["impl"] == bench_train.V1
    )  # fmt: skip
    assert case.head["compute"] == "fp16" and case.name.endswith("fp16 ours pythia-v1")
    config = bench_train.configuration("410m", 32, 2048, "fp16", "pythia-v1")
    p = config.precision
    assert (p.compute, p.gradients, p.gradient_sum) == ("fp16", "fp16", "fp16")
    assert p.loss_scaling == "hysteresis" and p.ranks == 2 and config.accumulation == 1
    assert config.optimizer.step_offset == 1 and config.model.rope_table == "fp16"
    clean = bench_train.configuration("410m", 32, 2048, "bf16")
    assert clean.precision.gradients == "fp32" and clean.precision.ranks == 1
    for c in (config, clean):
        assert {train.learning_rate(c.optimizer, n, 100) for n in (0, 1, 99)} == {3e-4}
    row = measure(bench_train.V1, compute="fp16")
    assert (row["recipe"], row["sum_ranks"], row["micro_batch_size"]) == ("pythia-v1", 2, 2)
    assert measure()["recipe"] == "clean"


def test_steps_that_loss_scaling_skips_are_not_counted() -> None:
    config = bench_train.configuration("tiny", 4, 16, "fp16", "pythia-v1")
    norms = iter([float("inf"), 2.0, float("inf"), 1.0])

    def step(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(5.0), torch.tensor(next(norms))

    stepper = Stepper(torch.nn.Module(), step, lambda rows: rows, lambda rows: ())
    found = train_check.first_steps(stepper, config, torch.zeros(4, 17), 2)
    assert found.norms == [2.0, 1.0] and found.losses == [5.0, 5.0]


def test_a_reference_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(config, tokens):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(train_check, "reference", exhausted)
    row = measure()
    assert row["unchecked"] == "gradients: CUDA out of memory. Tried to allocate 9 GiB"


class Stalling(FakeClock):
    """The last step of the five takes a second."""

    def intervals(self) -> list[float]:
        found = super().intervals()
        return [*found[:-1], 1000.0] if len(found) > 1 else found


def test_a_stall_counts_in_the_rate() -> None:
    row = measure(clock=Stalling())
    assert row["ms_p50"] == 4.0 and row["tokens_per_s"] == pytest.approx(5 * 64 / 1.016)


def test_a_sustained_row_takes_as_many_steps_as_its_seconds_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_train, "MOST", 10)
    assert len(measure(seconds=0.2)["ms"]) == 10
    assert len(measure(seconds=0.2, sustained=True)["ms"]) == 50
    (case,) = bench_train.cases(["410m"], ["ours"], 0, True, 60.0, sustained=True)
    assert case.name == "train sustained 410m 32x2048 bf16 ours" and case.limit_s == 360


def test_the_best_peer_is_the_fastest_that_is_not_ours() -> None:
    def row(impl: str, rate: float, **more: object) -> Row:
        head = {"bench": "train", "status": "ok", "size": "410m", "impl": impl}
        return head | {"tokens_per_s": rate} | more

    rows = [row("ours", 9.0), row("ours pythia-v1", 8.0), row("eager", 2.0), row("compile", 3.0)]
    rows += [row("fast", 7.0, status="wrong"), row("fast", 7.0, size="70m"), {"bench": "data"}]
    assert bench_train.best_peer(rows, "410m") == "compile"
    assert bench_train.best_peer(rows, "1b") is None


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


def test_only_the_last_step_is_reported() -> None:
    def event(name: str, start: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=start + 1))

    marks = [event("ProfilerStep#1", 10.0), event("ProfilerStep#2", 20.0)]
    found = bench_profile.last_step([event("a", 11.0), event("b", 20.5), event("c", 21.0), *marks])
    assert [e.name for e in found] == ["b", "c"]


def test_profile_of_a_step_on_the_cpu() -> None:
    (row,) = bench_profile.measure("tiny", "ours", 4, 16, "fp32")
    names = {k["name"] for k in row["by_name"]}
    assert {"aten::mm", "aten::_fused_adamw_"} <= names
    listed = sum(k["ms"] for k in row["by_name"])
    assert listed + row["other_ms"] == pytest.approx(row["busy_ms"], rel=1e-3)
    (update,) = (k for k in row["by_name"] if k["name"] == "aten::_fused_adamw_")
    assert update["calls"] == 2  # decaying and not, of one step
