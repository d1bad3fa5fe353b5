"""On a GPU: the cases of `python -m bench.check`, here in one process."""

from __future__ import annotations

import pytest
import torch

from bench.check import Task, check_case, plan
from bench.op_table import find
from bench.runner import DTYPES

TASKS = [(task, dtype) for task in plan(None, False) if not task.tool for dtype in task.dtypes]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("task", "dtype"), TASKS, ids=[f"{t.label}-{t.shape.size}-{dtype}" for t, dtype in TASKS]
)
def test_op_on_a_real_shape(task: Task, dtype: str) -> None:
    row = check_case(find(task.label), task.shape, DTYPES[dtype], torch.device("cuda"))
    assert row["status"] == "ok", row
