"""Pipelines of gloo processes: recipes, kernels, overlap, checkpoints, stages, what is refused.

Losses and gradients of every schedule beside every other axis: test_matrix.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from data_parallel import steps
from layout_proof import SUMS, assembled
from parallel_proof import carry, digests, follow, run
from ranks import Ranks, RanksFailed

from pythia_fast.config import resolve
from pythia_fast.parallel.pipeline import layers_of_stages

SMALL = """
--model.layers 8 --model.heads 4 --train.micro_batch_size 1 --train.batch_size 8 --train.steps 4
--optimizer.clip 0.5 --optimizer.warmup 0.1 --optimizer.backend triton --parallel.shard none
""".split()  # torch's AdamW would leave clipped gradients behind


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.make_page(tmp_path_factory.mktemp("pipeline")))


def check_gradients(
    found: list[dict[str, Any]], one: dict[str, Any], near: tuple[str, ...] = ()
) -> None:
    """Of the first step, to the bit, but for names that end in `near`: rounded once more."""
    gradients = assembled(found)
    assert gradients.keys() == one["gradients"].keys()
    for name, gradient in gradients.items():
        wanted = one["gradients"][name]
        ulps = 1e-6 * np.abs(wanted).max() if name.endswith(near) else 0.0
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=0, atol=ulps, err_msg=name)


def check_steps(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """The norm's squares are added in parts, which moves the clip factor by rounding."""
    for process in found:
        np.testing.assert_allclose(process["steps"], one["steps"], rtol=SUMS)
        assert process["valid"] == pytest.approx(one["valid"], rel=SUMS)


def pipe(degree: int, schedule: str, stages: int = 1, *more: str) -> list[str]:
    flags = ["--parallel.pipeline", str(degree), "--parallel.schedule", schedule]
    return [*flags, "--parallel.stages_per_rank", str(stages), *more]


def named(flags: list[str]) -> str:
    return " ".join(flag for flag in flags if not flag.startswith("--"))


TENSOR, SHARDED = ["--parallel.tensor", "2"], ["--parallel.shard", "optimizer"]


@pytest.mark.parametrize(
    "flags",
    [
        pipe(2, "zero-bubble", 2),
        *(
            pytest.param(flags, marks=pytest.mark.parallel)
            for flags in (
                pipe(2, "gpipe"),
                pipe(2, "1f1b"),
                pipe(2, "interleaved-1f1b", 2),
                pipe(2, "zero-bubble"),
                pipe(2, "1f1b", 1, "--parallel.shard", "none"),
            )
        ),
    ],
    ids=named,
)
def test_copies_of_a_pipeline_add_up_on_the_way(ranks: Ranks, page: str, flags: list[str]) -> None:
    """To the bit of two copies without one, and while the last microbatches pass through it."""
    eight = "--model.layers 8 --optimizer.backend triton".split()  # leaves gradients as they were
    copies = ranks.call(2, steps, Path(page), eight, 1)[0]
    for process in ranks.call(4, steps, Path(page), [*eight, *flags], 1):
        for name, gradient in process["gradients"].items():
            np.testing.assert_array_equal(gradient, copies["gradients"][name], err_msg=name)
        assert process["buckets"] > 3 and process["early"] == [process["buckets"]]


R16 = """--precision.compute bf16 --precision.gradients bf16 --precision.gradient_sum bf16
--precision.sum_ranks 2""".split()
FP16 = "--precision.compute fp16 --precision.loss_scaling hysteresis".split()
COPIES = "--optimizer.norm_copies 2 --optimizer.row_bias_copies 2".split()


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("world", "precision", "flags"),
    [
        (4, R16, pipe(2, "1f1b", 1, *SHARDED)),
        (2, FP16, pipe(2, "1f1b")),
        (4, COPIES, pipe(2, "1f1b", 1, *TENSOR)),
    ],
    ids=["16-bit gradients", "loss scaling", "copies"],
)
def test_recipes_of_the_original_in_a_pipeline(
    ranks: Ranks, page: str, world: int, precision: list[str], flags: list[str]
) -> None:
    one = ranks.call(1, follow, page, [*SMALL, *precision], 3)[0]
    check_steps(ranks.call(world, follow, page, [*SMALL, *precision, *flags], 3), one)


@pytest.mark.parallel
def test_halves_of_kernels_that_are_not_fused(ranks: Ranks, page: str) -> None:
    """torch runs a norm's backward once for each half: it may consume nothing."""
    flags = [*SMALL, *FP16, "--precision.gradients", "fp16", "--kernels.backend", "triton"]
    flags += ["--model.hidden", "128", "--model.layers", "2", "--train.batch_size", "2"]
    one = ranks.call(1, follow, page, flags, 1)[0]
    found = ranks.call(2, follow, page, [*flags, *pipe(2, "zero-bubble")], 1)
    assert not any(process["fused"] for process in found)
    check_gradients(found, one)
    check_steps(found, one)


FUSED = """--kernels.backend triton --model.hidden 128 --model.layers 4 --train.batch_size 2
""".split()


@pytest.fixture(scope="module")
def alone_on_kernels(ranks: Ranks, page: str) -> dict[str, Any]:
    return ranks.call(1, follow, page, [*SMALL, *FUSED], 1)[0]


def check_fused(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """bo and b2: the block above adds them up on its way, if it is there."""
    assert all(process["fused"] for process in found)
    check_gradients(found, one, near=("attention.dense.bias", "dense_4h_to_h.bias"))


@pytest.mark.parametrize(
    "flags",
    [
        pipe(2, "1f1b"),
        pipe(2, "zero-bubble", 2),
        pytest.param(pipe(2, "interleaved-1f1b", 2), marks=pytest.mark.parallel),
        pytest.param(
            pipe(2, "zero-bubble", 1, "--kernels.recompute", "selective"),
            marks=pytest.mark.parallel,
        ),
        pytest.param(pipe(4, "zero-bubble"), marks=pytest.mark.parallel),
    ],
    ids=named,
)
def test_the_fused_blocks_of_a_stage(
    ranks: Ranks, page: str, alone_on_kernels: dict[str, Any], flags: list[str]
) -> None:
    found = ranks.call(int(flags[1]), follow, page, [*SMALL, *FUSED, *flags], 1)
    check_fused(found, alone_on_kernels)
    check_steps(found, alone_on_kernels)


def test_checkpoints_pass_between_pipelines(ranks: Ranks, page: str, tmp_path: Path) -> None:
    source = tmp_path / "trained"
    ranks.call(4, run, page, [*SMALL, *pipe(2, "1f1b"), "--parallel.tensor", "2"], str(source))
    wanted = digests(source)
    assert len(wanted) == 3 * (12 * 8 + 4)
    shard = ["--parallel.shard", "optimizer"]
    chain = [(1, []), (4, pipe(4, "1f1b")), (2, pipe(2, "interleaved-1f1b", 2)),
             (4, [*pipe(2, "1f1b"), *shard]), (2, ["--parallel.tensor", "2"])]  # fmt: skip
    for i, (world, flags) in enumerate(chain):
        target = tmp_path / f"carried{i}"
        ranks.call(world, carry, page, [*SMALL, *flags], str(source), str(target))
        assert digests(target) == wanted, flags
        source = target


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (pipe(2, "1f1b", 2), "stages_per_rank = 2 needs"),
        (pipe(2, "interleaved-1f1b", 2, "--train.batch_size", "5"), "5 microbatches a step are not 2 equal rounds of at least parallel.pipeline = 2"),
        (pipe(2, "1f1b", 1, *R16), "precision.sum_ranks = 2 with parallel.pipeline = 2 needs parallel.data = 2, not 1"),
        (pipe(2, "interleaved-1f1b", 5), "model.layers = 8 are fewer than the 10 pipeline stages"),
    ],
    ids=lambda v: None if isinstance(v, list) else v[:24],
)  # fmt: skip
def test_what_does_not_fit_is_named(ranks: Ranks, page: str, flags: list[str], said: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.call(2, follow, page, [*SMALL, *flags], 1)
    assert all("InputError" in text and said in text for text in failed.value.errors.values())


@pytest.mark.parametrize("size", ["70m", "160m", "12b"])
def test_stages_hold_every_layer_once_and_the_head_weighs(size: str) -> None:
    for degree, stages in itertools.product((2, 3), (1, 2)):
        config = resolve({
            "model.preset": f"pythia-{size}", "parallel.pipeline": degree,
            "parallel.stages_per_rank": stages, "train.micro_batch_size": 8,
        })  # fmt: skip
        cut = layers_of_stages(config)
        assert [i for stage in cut for i in stage] == list(range(config.model.layers))
        assert len(cut) == degree * stages and all(cut)
        assert len(cut[-1]) <= min(len(stage) for stage in cut)
        if size == "160m" and (degree, stages) == (2, 1):  # head: 38.6 M of 4·(7.1 M) a layer
            assert len(cut[0]) > len(cut[1])


def test_a_lost_half_is_seen(ranks: Ranks, page: str, alone_on_kernels: dict[str, Any]) -> None:
    flags = [*SMALL, *FUSED, *pipe(2, "zero-bubble")]
    found = ranks.call(2, follow, page, flags, 1, "the weights' half of a microbatch is lost")
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check_fused(found, alone_on_kernels)
