"""Data parallelism: states of every process over several steps, overlap, 16-bit sums, mutants.

Losses and gradients of every layout: test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_parallel
import pytest
import tiny_run
import torch
from kernel_proof import BROKEN, Mutant
from layout_proof import LOSS, SUMS, Reference, check_gradient
from parallel_proof import exact_gradients
from ranks import Ranks, RanksFailed

from pythia_fast.parallel.degrees import Degrees

FP32, BF16 = ["--precision.compute", "fp32"], ["--precision.compute", "bf16"]
# few rows: kernels are interpreted
TINY = ["--train.batch_size", "4", "--train.valid_rows", "2"]
ARRIVALS = {
    "fp32": FP32,  # the master itself is sent
    "bf16": ["--precision.compute", "bf16"],
    "fused": [*FP32, "--kernels.backend", "triton", "--model.hidden", "128"],
}
ON_OPS = [*FP32, "--optimizer.backend", "triton"]  # the op's update, not torch's AdamW


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_page(tmp_path_factory.mktemp("data-parallel"))


@pytest.fixture(scope="module")
def alone(page: Path) -> dict[str, Reference]:
    found = {}
    for name, flags in {"fp32": FP32, "bf16": BF16, "fp32 on ops": ON_OPS}.items():
        one = data_parallel.steps(page, flags, 4)
        exact = exact_gradients(str(page), [*data_parallel.SMALL, *flags])
        found[name] = Reference(one, exact, name[:4], 8)
    return found


def check_equal(results: list[dict[str, Any]], reference: Reference) -> None:
    """Four steps, clipped; gradients of the first."""
    one, near = reference.one, LOSS[reference.compute]
    for result in results:
        for name, gradient in one["gradients"].items():
            check_gradient(name, result["gradients"][name], gradient, reference, Degrees(data=2))
        assert result["norms"][0] == pytest.approx(one["norms"][0], rel=SUMS)
        assert result["losses"][0] == pytest.approx(one["losses"][0], rel=SUMS)
        assert result["losses"] == pytest.approx(one["losses"], rel=near)
        assert result["valid"] == pytest.approx(one["valid"], rel=near)
        assert result["norms"] == pytest.approx(one["norms"], rel=20 * near)
        assert (result["losses"], result["norms"]) == (results[0]["losses"], results[0]["norms"])
        for kind in ("weights", "master", "exp_avg_sq"):  # every process has the same bits
            for name, value in result[kind].items():
                assert torch.equal(value, results[0][kind][name]), (kind, name)
        for name, weight in result["weights"].items():
            assert torch.equal(weight, result["master"][name].to(weight.dtype)), name


CASES = [
    pytest.param(2, "optimizer", "fp32 on ops"),
    pytest.param(2, "none", "bf16"),
    pytest.param(4, "full", "bf16"),
    pytest.param(4, "optimizer", "bf16", marks=pytest.mark.parallel),
    pytest.param(4, "full", "fp32 on ops", marks=pytest.mark.parallel),
]


@pytest.mark.parametrize("world,shard,compute", CASES)
def test_states_are_shared_and_the_same_everywhere(
    world: int, shard: str, compute: str, ranks: Ranks, page: Path, alone: dict[str, Reference]
) -> None:
    flags = BF16 if compute == "bf16" else ON_OPS
    results = ranks.call(world, data_parallel.steps, page, [*flags, "--parallel.shard", shard], 4)
    check_equal(results, alone[compute])
    for result in results:
        parts = 1 if shard == "none" else world
        padding = 128 * world * len(result["weights"])  # elements, at most
        assert result["states"] * parts < alone["fp32"].one["states"] + padding


def test_buckets_set_off_while_the_backward_pass_runs(ranks: Ranks, page: Path) -> None:
    """And it changes no bit."""
    early, late = (
        ranks.call(2, data_parallel.steps, page, ["--parallel.shard", shard], 2, bucket)
        for shard, bucket in (("optimizer", 1), ("optimizer", 1 << 30))
    )
    check_early(early)
    assert late[0]["buckets"] == 2
    for name, weight in early[0]["weights"].items():
        assert torch.equal(weight, late[0]["weights"][name]), name


@pytest.mark.parametrize("kind", ARRIVALS)
def test_weights_arrive_while_the_next_step_begins(kind: str, ranks: Ranks, page: Path) -> None:
    """None is read before it is waited for, though it came at the last moment: to the bit."""
    flags = [*TINY, *ARRIVALS[kind]]
    at_once, late = (
        ranks.call(2, call, page, flags, 3)
        for call in (data_parallel.steps, data_parallel.late_steps)
    )
    assert all(result["fused"] == (kind == "fused") for result in late)
    check_same_steps(late, at_once)


def check_same_steps(results: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for result, other in zip(results, wanted, strict=True):
        for kind in ("losses", "norms", "valid"):
            assert result[kind] == other[kind], kind
        for name, weight in other["weights"].items():
            assert torch.equal(result["weights"][name], weight), name


FP16 = """--precision.compute fp16 --precision.gradients fp16 --precision.sum_ranks 2
--precision.loss_scaling hysteresis --optimizer.norm_copies 2 --optimizer.row_bias_copies 2""".split()


def check_same_gradients(results: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Two terms have one order of addition, so they agree bit for bit."""
    for result in results:
        for name, gradient in one["gradients"].items():
            assert torch.equal(result["gradients"][name], gradient), name


FULL, UNSHARDED = ["--parallel.shard", "full"], ["--parallel.shard", "none"]
DATA, OPTIM, LOADER, MODEL = (
    f"pythia_fast/{name}.py" for name in ("parallel/data", "optim", "data/loader", "model")
)
MUTANTS = [
    Mutant("all own the first part", DATA, "slice(bucket.start + self.copy * length, bucket.start + (self.copy + 1) * length)", "slice(bucket.start, bucket.start + length)"),
    Mutant("sets off with its first gradient", DATA, "if self._left[bucket] == 0:", "if bucket not in self._running:"),
    Mutant("a step's count is never refilled", DATA, "        self._running = {}\n        self._left = list(self._elements)\n", "        self._running = {}\n"),
    Mutant("all train on the same rows", LOADER, "starts = range(self.copy * b,", "starts = range(0,"),
    Mutant("rows in blocks", LOADER, "return [slice(start, start + b) for start in starts]", "return [slice(self.copy * len(starts) * b + i * b, self.copy * len(starts) * b + i * b + b) for i in range(len(starts))]"),
    Mutant("norm of the own part", OPTIM, "            dist.all_reduce(square)\n", ""),
    Mutant("norm of all copies", OPTIM, "square.zero_()", "pass"),
    Mutant("weights not gathered", OPTIM, "        self._share_weights()\n\n    @property", "\n    @property"),
    Mutant("weights of torch's update not gathered", OPTIM, "        if not from_model:\n", "        if False:\n"),
    Mutant("every microbatch sets off", OPTIM, "self._reduction is not None and self.last", "self._reduction is not None"),
    Mutant("nothing sets off early", OPTIM, "self._reduction is not None and self.last", "False"),
    Mutant("validation of the own rows", "pythia_fast/train.py", 'return self.mesh.sum_(total, "data").item()', "return total.item()"),
    Mutant("FSDP averages", DATA, "            module.set_gradient_divide_factor(1.0)  # a sum: the loss has been divided\n", ""),
    Mutant("averaged", DATA, "        for work, _ in self._running.values():\n            work.wait()\n", "        for work, _ in self._running.values():\n            work.wait()\n        for total in self.totals:\n            total.div_(2)\n"),
]  # fmt: skip


LATE_MUTANTS = [
    Mutant("embedding too early", MODEL, "        self.gpt_neox.before(self.gpt_neox.embed_in)\n", ""),
    Mutant("layers too early", MODEL, "        self.gpt_neox.before(layer)\n", ""),
    Mutant("head too early", MODEL, '(M,)."""\n        self.gpt_neox.before(self.embed_out)\n', '(M,)."""\n'),
    Mutant("nothing is waited for", DATA, "for bucket in self._wanted[module]:", "for bucket in []:"),
    Mutant("autograd counts arrivals", DATA, "weight.data, own, group", "weight, own, group"),
    Mutant("one bucket of a layer", DATA, "for bucket in self._wanted[module]:", "for bucket in self._wanted[module][:1]:"),
]  # fmt: skip


def check_early(results: list[dict[str, Any]]) -> None:
    """No bucket waits for the end of the backward pass."""
    for result in results:
        assert result["buckets"] == 5  # embed_in, two layers, embed_out, vectors
        assert result["early"] == [5] * len(result["losses"])


@pytest.mark.parallel
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_are_killed(
    mutant: Mutant, ranks: Ranks, page: Path, alone: dict[str, Reference]
) -> None:
    def check(like: str, flags: list[str], buckets: bool = True) -> None:
        results = ranks.call(2, data_parallel.steps_of_mutant, page, flags, 4, mutant)
        check_equal(results, alone[like])
        if buckets:
            check_early(results)

    def check_fp16() -> None:
        one = data_parallel.steps(page, FP16, 1)
        check_same_gradients(
            ranks.call(2, data_parallel.steps_of_mutant, page, FP16, 1, mutant), one
        )

    killed = False
    for case in (
        lambda: check("fp32 on ops", ON_OPS),
        lambda: check("fp32", FP32),
        lambda: check("fp32", UNSHARDED),
        lambda: check("fp32", FULL, buckets=False),
        check_fp16,
    ):
        try:
            case()
        except RanksFailed as failed:
            said = " ".join(failed.errors.values())
            assert not any(f"{error.__name__}:" in said for error in BROKEN), said
            killed = True
        except AssertionError:
            killed = True
    assert killed


@pytest.mark.parallel
@pytest.mark.parametrize("kind", ["fp32", "fused"])
@pytest.mark.parametrize("mutant", LATE_MUTANTS, ids=lambda m: m.name)
def test_mutants_that_read_too_early_are_killed(
    mutant: Mutant, kind: str, ranks: Ranks, page: Path
) -> None:
    flags = [*TINY, *ARRIVALS[kind]]
    wanted = ranks.call(2, data_parallel.steps, page, flags, 3)
    with pytest.raises((AssertionError, RanksFailed)) as killed:
        call = data_parallel.steps_of_mutant
        check_same_steps(ranks.call(2, call, page, flags, 3, mutant, True), wanted)
    if isinstance(killed.value, RanksFailed):
        assert all("modified by an inplace" in e for e in killed.value.errors.values())


@pytest.mark.parametrize("total", ["fp32", "fp16"])
@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_ranks_that_are_processes_add_up_as_ranks_on_one_do(
    total: str, shard: str, ranks: Ranks, page: Path
) -> None:
    flags = [*FP16, "--precision.gradient_sum", total]
    one = data_parallel.steps(page, flags, 3)
    results = ranks.call(2, data_parallel.steps, page, [*flags, "--parallel.shard", shard], 3)
    check_same_gradients(results, one)
    for result in results:
        assert result["updates"] == one["updates"]
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-3)


REFUSED = [
    ([*FP16, "--precision.sum_ranks", "4"], "parallel.data = 2 is not precision.sum_ranks = 4: "),
    ([*FP16, *FULL], "parallel.shard = 'full' sums gradients in fp32, not precision.gradients = 'fp16'"),
    ([*FULL, "--optimizer.states", "lean", "--precision.compute", "bf16"], "optimizer.states = 'lean' does not go with parallel.shard = 'full'"),
    ([*FULL, "--model.vocab_size", "65"], "model.vocab_size = 65 is not divisible by parallel.data = 2 times parallel.tensor = 1,"),
    ([*FULL, "--model.hidden", "63", "--model.heads", "9", "--model.rotary_pct", "0.3"], "model.hidden = 63 is not divisible by parallel.data = 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    "flags,message", REFUSED, ids=lambda x: x[:30] if isinstance(x, str) else ""
)
def test_what_does_not_fit_is_refused_on_every_process(
    flags: list[str], message: str, ranks: Ranks, page: Path
) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.call(2, data_parallel.steps, page, flags, 1)
    assert all(f"InputError: {message}" in error for error in failed.value.errors.values())
    assert len(failed.value.errors) == 2
