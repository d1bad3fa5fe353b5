"""The baselines' work and arithmetic on the CPU, by a timer that is not a clock."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from fake_timing import two_milliseconds

from bench import bench_baselines
from bench.op import SIZES, shape

SCALE = {"side": 16, "copy_bytes": 4096, "tokens": 2, "vocab": 30, "rows": 1, "positions": 8}


def rows_of(kind: str, **what: Any) -> list[dict]:
    return list(bench_baselines.measure(kind, two_milliseconds, SCALE, **what))


def test_sustained_product() -> None:
    (row,) = rows_of("product", seconds=0.01)
    assert row["limit"] == "tflops" and row["tflops"] > 0 and row["tflops_first"] > 0
    assert row["tflops"] == pytest.approx(2 * 16**3 / row["ms_p50"] / 1e9, rel=1e-3)


def test_copy() -> None:
    (row,) = rows_of("copy")
    assert row["limit"] == "gbps" and row["gbps"] == pytest.approx(2 * 4096 / 2e-3 / 1e9)


def test_products_of_a_size() -> None:
    """Five layers, forward and both gradients, each 2·rows·outputs·inputs FLOPs."""
    rows = rows_of("products", size="14m")
    assert len(rows) == 15 and len({row["part"] for row in rows}) == 15
    assert {tuple(row["shape"]) for row in rows} == {
        (2, 384, 128), (2, 128, 128), (2, 512, 128), (2, 128, 512), (2, 30, 128),
    }  # fmt: skip
    for row in rows:
        m, n, k = row["shape"]
        assert row["tflops"] == pytest.approx(2 * m * n * k / 2e-3 / 1e12)


def test_attention() -> None:
    forward, backward = rows_of("attention", impl="flash", size="14m")
    assert forward["shape"] == [1, 4, 8, 32]
    causal = 4 * 1 * 4 * 8**2 * 32 / 2
    assert forward["tflops"] == pytest.approx(causal / 2e-3 / 1e12)
    assert backward["tflops"] == pytest.approx(2.5 * causal / 2e-3 / 1e12)


def test_cases_are_calls_of_measure_and_cover_the_suite() -> None:
    cases = list(bench_baselines.cases())
    assert [case.head["kind"] for case in cases[:2]] == ["product", "copy"]
    assert cases[0].what["seconds"] == 60.0 and cases[0].limit_s > 60
    for case in cases:
        inspect.signature(bench_baselines.measure).bind(**case.what)
    products = [c.head["size"] for c in cases if c.head["kind"] == "products"]
    assert products == list(SIZES)
    attention = {(c.head["impl"], c.head["size"]) for c in cases if c.head["kind"] == "attention"}
    dims = {shape(size, 1, 1).head_dim for _, size in attention}
    assert dims == {shape(size, 1, 1).head_dim for size in SIZES} and len(attention) == 10
