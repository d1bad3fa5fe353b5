"""Parts of a pipeline: the best cut, and what a tensor degree divides."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from kernel_proof import Mutant, assert_killed

from pythia_fast import plan, stages
from pythia_fast.config import resolve

FILE = "pythia_fast/stages.py"


def best_cut(module: ModuleType) -> None:
    """Against all cuts into runs of layers, by dynamic programming over the slowest."""
    ends = ((0.0, 0.0), (0.1, 0.8), (0.3, 2.7))
    for count, (embedding, head) in product([2, 3, 5, 8, 12, 24, 36], ends):
        chunks = module.cut(36, count, 1.0, embedding, head)
        assert sum(chunk.layers for chunk in chunks) == 36 and len(chunks) == count
        assert min(chunk.layers for chunk in chunks) >= 1
        assert chunks[0].embedding and chunks[-1].head
        best = {0: 0.0}
        for stage in range(count):
            extra = embedding * (stage == 0) + head * (stage == count - 1)
            best = {
                stop: min(max(cost, stop - begin + extra) for begin, cost in best.items()
                          if begin < stop)
                for stop in range(stage + 1, 37)
            }  # fmt: skip
        costs = [c.layers + embedding * c.embedding + head * c.head for c in chunks]
        assert max(costs) == pytest.approx(best[36])
    assert [c.layers for c in module.cut(36, 8, 1.0, 0.0, 0.8)] == [4, 4, 4, 5, 5, 5, 5, 4]


def test_cut_is_the_best() -> None:
    best_cut(stages)


def tensor_parallel(module: ModuleType) -> None:
    """4 ranks: a quarter of every product and byte but of the norms and the residual; the norms'
    too with sequence. At infinite width of a product, so that its length does not matter.
    """
    m, card, tokens = (
        resolve({"model.preset": "pythia-12b"}).model,
        replace(plan.GPUS["H100"], copy=1e12),
        2048,
    )
    one = module.layer_seconds(m, card, 2048, tokens)
    norms = 2 * 5120 * tokens / 1e12 * 3 / 4  # seconds of each element a token that is not split
    fill = 96 * 2 * tokens / card.product  # of a product, divided by the length that it contracts
    for sequence, forward, backward in ((False, 4, 5), (True, 0, 0)):
        four = module.layer_seconds(m, card, 2048, tokens, 4, sequence)
        # contracted: h by 7h/4 outputs, 5h/4 by h; in the backward 3h/4, h and h
        lost = fill * (5120 - 5120 / 4)  # the output product's shorter length
        assert four.forward - one.forward / 4 == pytest.approx(forward * norms + lost)
        lost = fill * (5120 - 5120 / 4) * 2  # of both column-parallel ones
        assert four.inputs - one.inputs / 4 == pytest.approx(backward * norms + lost)
        assert four.weights == pytest.approx(one.weights / 4)


def test_tensor_parallel_seconds() -> None:
    tensor_parallel(stages)


MUTANTS = [
    Mutant("head weighs nothing", FILE, "last * layer + head)", "last * layer)"),
    Mutant("layers left over behind the last stage first", FILE, "(i >= inner - more)", "(i < more)"),
    Mutant("norms split without sequence", FILE, "split = p if sequence else 1", "split = p"),
    Mutant("full products on every rank", FILE, "(h, 5 * h // p)]", "(h, 5 * h)]"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    def check(module: ModuleType) -> None:
        best_cut(module)
        tensor_parallel(module)

    assert_killed(mutant, check, tmp_path)
