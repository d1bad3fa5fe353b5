"""What the parallel tests share: processes that wait for work, a tiny run's page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_page(tmp_path_factory.mktemp("page"))
