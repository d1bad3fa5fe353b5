"""Steps on several processes against those of one process: what is equal, what is near, and why.

With only a pipeline, every number is formed by the same operations in the same order: gradients,
losses and the loss after an update are equal to the bit, in bf16 as in fp32.

With data parallelism a microbatch's gradient has the same bits on any process; what differs is the
order in which M microbatches are added in fp32. Each order errs by at most (M − 1)·2⁻²⁴·Σ‖gₘ‖, to
first order, so two differ by twice that.

With tensor parallelism P partial sums are rounded, to the compute dtype, where one process has one
sum. Roundings that are independent add up as a random walk does: against float64 gradients, √P
times one process's error, and once more for what the norms' gradients gather anew.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from parallel_proof import Exact
from torch import Tensor

from pythia_fast.parallel.degrees import Degrees

UNIT = 2.0**-24  # half a unit in the last place of 1, fp32
# A mean of losses is a sum of some hundred numbers near log V, so a few units; of bf16 the logits
# are rounded to 2⁻⁹, and so are weights, which Adam's first steps may round the other way
SUMS, LOSS = 16 * UNIT, {"fp32": 16 * UNIT, "bf16": 2.0**-9}


@dataclass(frozen=True)
class Reference:
    """One process's steps (`parallel_proof.follow`), and the first gradients in float64."""

    one: dict[str, Any]
    exact: dict[str, Exact]
    compute: str
    microbatches: int


def check(found: list[dict[str, Any]], reference: Reference, degrees: Degrees) -> None:
    """What the processes of a layout `found`, by rank, is what one process finds."""
    one, gradients = reference.one, assembled(found)
    assert gradients.keys() == one["gradients"].keys()
    pipeline_alone = degrees.data == degrees.tensor == 1
    for name, gradient in gradients.items():
        wanted = torch.from_numpy(one["gradients"][name])
        if pipeline_alone:
            np.testing.assert_array_equal(gradient.numpy(), wanted.numpy(), err_msg=name)
        else:
            check_gradient(name, gradient, wanted, reference, degrees)
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    for process in found:
        (losses, norms), (right, _) = process["steps"].T, one["steps"].T
        assert norms[0] == pytest.approx(norm, rel=SUMS)
        assert (process["steps"] == found[0]["steps"]).all()
        if pipeline_alone:
            assert (*losses, process["valid"]) == (*right, one["valid"])
            continue
        first = LOSS[reference.compute] if degrees.tensor > 1 else SUMS
        assert losses[0] == pytest.approx(right[0], rel=first)
        later, wanted = [*losses[1:], process["valid"]], [*right[1:], one["valid"]]
        assert later == pytest.approx(wanted, rel=LOSS[reference.compute])


def check_gradient(
    name: str, gradient: Tensor, one: Tensor, reference: Reference, degrees: Degrees
) -> None:
    exact = reference.exact[name]
    order = 2 * (reference.microbatches - 1) * UNIT * exact.sizes if degrees.data > 1 else 0.0
    if degrees.tensor == 1:
        assert distance(gradient, one) <= order, name
    else:
        walk = (1 + degrees.tensor**0.5) * distance(one, exact.gradient)
        assert distance(gradient, exact.gradient) <= walk + order, name


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖, in float64."""
    return (a.double() - b.double()).norm().item()


def assembled(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole gradients from the parts of all processes; copies of a part have the same bits."""
    parts: dict[str, dict[int, Tensor]] = {}
    for process in found:
        for name, gradient in process["gradients"].items():
            here, known = torch.from_numpy(gradient), parts.setdefault(name, {})
            assert torch.equal(known.setdefault(process["part"], here), here), name
    return {name: _joined(name, [of[i] for i in sorted(of)]) for name, of in parts.items()}


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Rows by head, of 4h or of the vocabulary, or the columns of what leaves a block."""
    if "norm" in name or name.endswith(("attention.dense.bias", "4h_to_h.bias")):
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    columns = name.endswith(("attention.dense.weight", "4h_to_h.weight"))
    return torch.cat(parts, 1 if columns else 0)


def check_rows(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Copies read different rows, together those of the step; a stage in the middle reads none."""
    by_copy: dict[int, Counter[bytes]] = {}
    for process in found:
        rows = Counter(row.tobytes() for row in process["rows"])
        if rows:
            assert by_copy.setdefault(process["copy"], rows) == rows
    every = Counter(row.tobytes() for row in one["rows"])
    assert sum(by_copy.values(), Counter()) == every
    assert len(by_copy) == 1 + max(process["copy"] for process in found)
    assert all(a != b for a, b in itertools.combinations(by_copy.values(), 2))
