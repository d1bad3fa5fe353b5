"""The helper of the parallel tests: results by rank, failures named, processes reused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel_proof import follow
from rank_checks import one_raises, threads, total
from ranks import Ranks, RanksFailed


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def test_results_by_rank_of_several_worlds(ranks: Ranks) -> None:
    for world in (2, 3, 1):
        assert ranks.call(world, total) == [(r, world * (world + 1) / 2) for r in range(world)]


def test_trainers_of_the_past_hold_nothing(ranks: Ranks, page: Path) -> None:
    """Not their groups: hundreds of cells run in the same processes."""
    counts = []
    for _ in range(3):
        ranks.call(2, follow, str(page), [], 1)
        counts.append(ranks.call(2, threads))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    "how,said",
    [("raises", "said by rank one"), ("ends", "the process ended"), ("hangs", "no answer")],
)
def test_a_failure_is_named_and_the_next_call_works(ranks: Ranks, how: str, said: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.call(2, one_raises, how, timeout=3)
    assert said in failed.value.errors[1]
    assert ranks.call(2, total) == [(0, 3.0), (1, 3.0)]
