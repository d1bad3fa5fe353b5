"""Training on several gloo processes against one: losses, gradients, collectives, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from parallel_proof import carry, collectives, digests, exact_gradients, follow, run
from ranks import Ranks

from pythia_fast.parallel.tensor import local_part

SMALL = """
--model.heads 4 --train.micro_batch_size 2 --train.batch_size 8 --train.steps 4
--optimizer.clip 0.5 --optimizer.warmup 0.1
""".split()  # clipped from the first step on: the norm reaches the weights
TENSOR2 = ["--parallel.tensor", "2"]
SEQUENCE = ["--parallel.sequence", "true"]
FULL = ["--parallel.shard", "full"]
# Sums of at most 256 products in fp32 are cut in P parts: a few units of 2⁻²⁴ of the largest. Over
# steps Adam follows the sign of gradients that are rounding alone; they do not move the loss.
GRADIENT, LOSS = 2e-6, 1e-6


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.make_page(tmp_path_factory.mktemp("parallel")))


@pytest.fixture(scope="module")
def alone(ranks: Ranks, page: str) -> dict[str, Any]:
    return ranks.call(1, follow, page, SMALL, 4)[0]


def check(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for process in found:
        np.testing.assert_allclose(process["steps"], one["steps"], rtol=LOSS)
        assert process["valid"] == pytest.approx(one["valid"], rel=LOSS)
        for name, moment in process["moments"].items():  # (1 − β₁)·g of the first step
            whole = torch.from_numpy(one["moments"][name])
            mine = local_part(name, whole, process["parts"], process["part"]).numpy()
            scale = np.abs(whole.numpy()).max()
            np.testing.assert_allclose(moment, mine, rtol=0, atol=GRADIENT * scale, err_msg=name)


def shown(value: object) -> str:
    """Of a test's parameter, in its name."""
    return " ".join(value).replace("--parallel.", "") if isinstance(value, list) else str(value)


LAYOUTS = [
    (2, TENSOR2),
    (2, [*TENSOR2, *SEQUENCE]),
    (4, [*TENSOR2, "--parallel.shard", "none"]),
    (4, [*TENSOR2, *SEQUENCE]),
    (4, [*TENSOR2, *FULL]),
    (4, ["--parallel.tensor", "4"]),
]
MORE = [
    (4, ["--parallel.tensor", "4", *SEQUENCE]),
    (8, TENSOR2),
    (8, [*TENSOR2, *SEQUENCE, "--parallel.shard", "none"]),
    (8, ["--parallel.tensor", "4"]),
    (8, ["--parallel.tensor", "4", *SEQUENCE]),
    (4, [*TENSOR2, *SEQUENCE, *FULL]),
    (8, [*TENSOR2, *SEQUENCE, *FULL]),
    (8, ["--parallel.tensor", "4", *FULL]),
]


@pytest.mark.parametrize(
    ("world", "flags"),
    [*LAYOUTS, *(pytest.param(*more, marks=pytest.mark.parallel) for more in MORE)],
    ids=shown,
)
def test_a_layout_follows_one_process(
    ranks: Ranks, page: str, alone: dict[str, Any], world: int, flags: list[str]
) -> None:
    check(ranks.call(world, follow, page, [*SMALL, *flags], 4), alone)


UNCLIPPED = ["--optimizer.clip", "1e9", "--model.hidden", "64"]
ROUNDED = [
    (2, "bf16", TENSOR2),
    (2, "bf16", [*TENSOR2, *SEQUENCE]),
    *(
        pytest.param(world, compute, [*flags, *rest], marks=pytest.mark.parallel)
        for world, compute, flags in (
            (4, "bf16", ["--parallel.tensor", "4"]),
            (4, "bf16", [*TENSOR2, *FULL]),
            (2, "fp32", TENSOR2),
            (4, "fp32", ["--parallel.tensor", "4"]),
        )
        for rest in ([], SEQUENCE)
    ),
]


@pytest.mark.parametrize(("world", "compute", "flags"), ROUNDED, ids=shown)
def test_gradients_err_against_float64_as_those_of_one_process(
    ranks: Ranks, page: str, world: int, compute: str, flags: list[str]
) -> None:
    """‖error‖ of each parameter: P partial sums are rounded where one process has one sum.

    Roundings that are independent add up as a random walk does: √P times one, and one for what the
    norms' gradients gather anew.
    """
    like = [*SMALL, *UNCLIPPED, "--precision.compute", compute]
    exact = exact_gradients(page, like)
    one = ranks.call(1, follow, page, like, 1)[0]
    for process in ranks.call(world, follow, page, [*like, *flags], 1):
        parts = process["parts"]
        for name, moment in process["moments"].items():

            def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
                return (found.double() / 0.1 - wanted).norm().item()  # moment: (1 − β₁)·g

            whole = torch.from_numpy(one["moments"][name])
            part, right = (
                local_part(name, t, parts, process["part"]) for t in (whole, exact[name])
            )
            allowed = (1 + parts**0.5) * error(part, right)
            assert error(torch.from_numpy(moment), right) <= allowed, name


KERNELS = ["--kernels.backend", "triton", "--model.hidden", "128", "--train.steps", "2"]
KERNELS += ["--train.batch_size", "4"]


@pytest.fixture(scope="module")
def alone_on_kernels(ranks: Ranks, page: str) -> dict[str, Any]:
    return ranks.call(1, follow, page, [*SMALL, *KERNELS], 2)[0]


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("sequence", ["false", "true"])
def test_the_fused_block_on_its_part_of_the_heads(
    ranks: Ranks, page: str, alone_on_kernels: dict[str, Any], recompute: str, sequence: str
) -> None:
    flags = [*SMALL, *KERNELS, *TENSOR2, "--kernels.recompute", recompute]
    flags += ["--parallel.sequence", sequence]
    found = ranks.call(2, follow, page, flags, 2)
    assert all(process["fused"] for process in found)
    check(found, alone_on_kernels)


@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_the_fused_block_of_data_parallel_processes(
    ranks: Ranks, page: str, alone_on_kernels: dict[str, Any], shard: str
) -> None:
    """Embedding and head add their gradients themselves: autograd's hooks find none."""
    found = ranks.call(2, follow, page, [*SMALL, *KERNELS, "--parallel.shard", shard], 2)
    assert all(process["fused"] for process in found)
    check(found, alone_on_kernels)


# layers 2, microbatches m: embedding 1, each layer 1; backward each layer 1, final norm 1
@pytest.mark.parametrize("kernels", [[], KERNELS], ids=["ops", "fused"])
def test_collectives_of_a_step(ranks: Ranks, page: str, kernels: list[str]) -> None:
    m = 2 if kernels else 4
    layers, once = 2, 2  # once a step: gradients of the norms, the norm of all
    for counts in ranks.call(2, collectives, page, [*SMALL, *kernels, *TENSOR2]):
        assert counts == {"allreduce_": m * (2 + 2 * layers) + once, "_allgather_base_": m}


@pytest.mark.parametrize("kernels", [[], KERNELS], ids=["ops", "fused"])
def test_collectives_of_a_step_with_sequence_parallelism(
    ranks: Ranks, page: str, kernels: list[str]
) -> None:
    m, layers = 2 if kernels else 4, 2
    for counts in ranks.call(2, collectives, page, [*SMALL, *kernels, *TENSOR2, *SEQUENCE]):
        towards = m * (2 + 2 * layers)  # embedding, layers, and backward layers, final norm
        assert counts == {
            "_reduce_scatter_base_": towards, "_allgather_base_": towards + m, "allreduce_": 2,
        }  # fmt: skip


def test_collectives_of_data_parallelism(ranks: Ranks, page: str) -> None:
    """Of 2 × 2 processes: those of tensor parallelism; each bucket once, however many microbatches."""
    m, layers, buckets = 2, 2, 2
    tensor = m * (2 + 2 * layers) + 2 + 1  # the last: the loss, over data
    for shard, more in (
        ("optimizer", {"_reduce_scatter_base_": buckets, "_allgather_base_": m + buckets}),
        ("none", {"allreduce_": tensor + buckets}),
    ):
        flags = [*SMALL, *TENSOR2, "--parallel.shard", shard]
        for counts in ranks.call(4, collectives, page, flags):
            assert counts == {"allreduce_": tensor, "_allgather_base_": m, **more}


CHAIN = [
    (1, []),
    (2, ["--parallel.shard", "none"]),
    (4, TENSOR2),
    (2, []),
    (4, ["--parallel.tensor", "4"]),
    (4, []),
    (2, TENSOR2),
    (4, [*TENSOR2, *SEQUENCE, "--parallel.shard", "none"]),
    (4, FULL),
    (4, [*TENSOR2, *FULL]),
    (1, []),
]


def test_any_layout_loads_what_any_other_saved(ranks: Ranks, page: str, tmp_path: Path) -> None:
    """Weights and both moments by sha256 after each of eleven changes of the layout."""
    source = tmp_path / "trained"
    ranks.call(4, run, page, [*SMALL, *TENSOR2], str(source))
    wanted = digests(source)
    assert len(wanted) == 3 * 28
    for i, (world, flags) in enumerate(CHAIN):
        target = tmp_path / f"carried{i}"
        ranks.call(world, carry, page, [*SMALL, *flags], str(source), str(target))
        assert digests(target) == wanted, flags
        source = target


def test_a_run_goes_on_in_another_layout(ranks: Ranks, page: str, tmp_path: Path) -> None:
    flags = [*SMALL, "--train.steps", "6", "--checkpoint.every", "3"]
    whole = ranks.call(1, run, page, flags, str(tmp_path / "whole"))[0]
    ranks.call(4, run, page, [*flags, *TENSOR2], str(tmp_path / "changed"))
    newest = tmp_path / "changed" / "checkpoints" / "step6"
    newest.rename(tmp_path / "gone")
    ledger = (tmp_path / "changed" / "ledger.jsonl").read_text()
    again = ranks.call(2, run, page, flags, str(tmp_path / "changed"))[0]
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert (tmp_path / "changed" / "ledger.jsonl").read_text() == ledger
    assert ledger == (tmp_path / "whole" / "ledger.jsonl").read_text()


FAULTS = (
    "every process draws the first part",
    "partial gradients of the norms' input",
    "replicated gradients in the norm once a process",
    "a row bias once a process",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_training_are_seen(
    ranks: Ranks, page: str, alone: dict[str, Any], alone_on_kernels: dict[str, Any], fault: str
) -> None:
    fused = fault == "a row bias once a process"
    flags, one = ([*SMALL, *KERNELS], alone_on_kernels) if fused else (SMALL, alone)
    found = ranks.call(2, follow, page, [*flags, *TENSOR2], len(one["steps"]), fault)
    with pytest.raises(AssertionError):
        check(found, one)


def test_faults_of_checkpoints_are_seen(ranks: Ranks, page: str, tmp_path: Path) -> None:
    fault = "boxes of the other process"
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    ranks.call(2, run, page, [*SMALL, *TENSOR2], str(right))
    ranks.call(2, run, page, [*SMALL, *TENSOR2], str(wrong), fault)
    assert digests(wrong) != digests(right)
