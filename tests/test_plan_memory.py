"""The memory that a plan names, against every tensor of a step counted on the meta device."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from count_memory import step_bytes
from kernel_proof import Mutant, assert_killed

import pythia_fast.plan as real
from pythia_fast.config import Config, resolve

ROWS = {"70m": 32, "160m": 32, "410m": 32, "1b": 16, "1.4b": 16, "2.8b": 8, "6.9b": 4, "12b": 2}
WITHIN = 0.02  # of the bytes beside the states; what differs most are attention's segments of dq


def page(size: str, rows: int, **more: object) -> Config:
    keys = {"model.preset": f"pythia-{size}", "train.batch_size": 2 * rows}
    keys |= {"train.micro_batch_size": rows} | {k.replace("__", "."): v for k, v in more.items()}
    return resolve(keys)  # type: ignore[arg-type]


LEAN = {"optimizer__states": "lean", "precision__gradients": "bf16"}
CASES = [
    *((size, rows, {"kernels__recompute": kept}) for size, rows in ROWS.items() for kept in ("none", "selective")),
    ("12b", 4, LEAN | {"kernels__recompute": "selective"}),
    ("12b", 1, LEAN),
    ("6.9b", 8, {"optimizer__states": "lean", "kernels__recompute": "selective"}),
]  # fmt: skip


def check(module: ModuleType, cases: list[tuple[str, int, dict[str, str]]] = CASES) -> None:
    for size, rows, more in cases:
        config = page(size, rows, **more)
        stays, peak = step_bytes(config)
        found = module.memory_of(config)
        assert abs(found.states / stays - 1) < 1e-3, f"{size}: {found.states}, counted {stays}"
        beside = (found.total - found.states) / (peak - stays)
        assert abs(beside - 1) < WITHIN, f"{size} {more}: {found}, counted {peak}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(map(str, (*c[:2], *c[2].values()))))
def test_planned_is_counted(case: tuple[str, int, dict[str, str]]) -> None:
    check(real, [case])


PLAN = "pythia_fast/plan.py"
MUTANTS = [
    Mutant("logits in fp32", PLAN, "logits=2 * m.vocab_size", "logits=4 * m.vocab_size"),
    Mutant("activations of one fewer", PLAN, "ACTIVATION_ELEMENTS = 15", "ACTIVATION_ELEMENTS = 14"),
    Mutant("recomputed kept", PLAN, "RECOMPUTED_ELEMENTS = 6", "RECOMPUTED_ELEMENTS = 5"),
    Mutant("a dense gradient of the embedding", PLAN, "by_autograd = 2 * m.hidden if fused", "by_autograd = m.vocab_size * m.hidden if fused"),
    Mutant("no working memory", PLAN, "working=working_bytes(m, selective) * micro_tokens", "working=0"),
    Mutant("no backward of a block", PLAN, "max(6 * m.hidden, backward - logits)", "6 * m.hidden"),
    Mutant("lean states of 10 bytes", PLAN, "LEAN_STATES = 8", "LEAN_STATES = 10"),
    Mutant("gradients of lean states not fused", PLAN, '(lean and p.ranks == 1)', "False"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def test_what_fits_one_h200() -> None:
    """6.9b with fp32 states and recomputation, 12b with lean states, 12b not with fp32's."""
    recompute = {"kernels__recompute": "selective"}
    fits = {
        name: real.plan(page(size, rows, **recompute, **more), "H200")
        for name, size, rows, more in (
            ("6.9b", "6.9b", 4, {}), ("12b lean", "12b", 2, LEAN), ("12b", "12b", 1, {}),
            ("12b lean, fp32 gradients", "12b", 1, {"optimizer__states": "lean"}),
        )
    }  # fmt: skip
    assert {name for name, row in fits.items() if row["fits"]} >= {"6.9b", "12b lean"}
    assert not fits["12b"]["fits"]
