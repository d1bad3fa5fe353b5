"""Shared set-up: the Triton interpreter where there is no GPU, and poisoned fresh memory."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
torch.set_num_threads(1)  # one worker a core: `make test` starts two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN (floats) or the lowest value (integers)."""
    with torch.device("meta"):  # on first use it lists torch's constructors, once for all
        torch.empty(0)

    def poisoned(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            t = function(*args, **kwargs)
            if t.dtype.is_floating_point:
                return t.fill_(float("nan"))
            return t if t.dtype == torch.bool else t.fill_(torch.iinfo(t.dtype).min)

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
