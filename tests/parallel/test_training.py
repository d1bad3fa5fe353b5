"""Training on several gloo processes: fused blocks, collectives of a step, checkpoints.

Losses and gradients of every layout: test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
from layout_proof import Reference, check
from parallel_proof import carry, collectives, digests, exact_gradients, follow, run
from ranks import Ranks

from pythia_fast.parallel.degrees import Degrees

SMALL = """
--model.heads 4 --train.micro_batch_size 2 --train.batch_size 8 --train.steps 4
--optimizer.clip 0.5 --optimizer.warmup 0.1
""".split()  # clipped from the first step on: the norm reaches the weights
TENSOR2 = ["--parallel.tensor", "2"]
SEQUENCE = ["--parallel.sequence", "true"]
FULL = ["--parallel.shard", "full"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.make_page(tmp_path_factory.mktemp("parallel")))


KERNELS = ["--kernels.backend", "triton", "--model.hidden", "128", "--train.steps", "2"]
KERNELS += ["--train.batch_size", "4"]


@pytest.fixture(scope="module")
def alone_on_kernels(ranks: Ranks, page: str) -> Reference:
    flags = [*SMALL, *KERNELS]
    one = ranks.call(1, follow, page, flags, 2)[0]
    return Reference(one, exact_gradients(page, flags), "fp32", 2)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("sequence", ["false", "true"])
def test_the_fused_block_on_its_part_of_the_heads(
    ranks: Ranks, page: str, alone_on_kernels: Reference, recompute: str, sequence: str
) -> None:
    flags = [*SMALL, *KERNELS, *TENSOR2, "--kernels.recompute", recompute]
    flags += ["--parallel.sequence", sequence]
    found = ranks.call(2, follow, page, flags, 2)
    assert all(process["fused"] for process in found)
    check(found, alone_on_kernels, Degrees(tensor=2))


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


def test_a_row_bias_once_a_process_is_seen(
    ranks: Ranks, page: str, alone_on_kernels: Reference
) -> None:
    flags, fault = [*SMALL, *KERNELS, *TENSOR2], "a row bias once a process"
    found = ranks.call(2, follow, page, flags, 2, fault)
    with pytest.raises(AssertionError):
        check(found, alone_on_kernels, Degrees(tensor=2))


def test_faults_of_checkpoints_are_seen(ranks: Ranks, page: str, tmp_path: Path) -> None:
    fault = "boxes of the other process"
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    ranks.call(2, run, page, [*SMALL, *TENSOR2], str(right))
    ranks.call(2, run, page, [*SMALL, *TENSOR2], str(wrong), fault)
    assert digests(wrong) != digests(right)
