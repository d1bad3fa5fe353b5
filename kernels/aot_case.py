"""One kernel in one configuration that a Pythia size uses, as `aot.py` compiles it.

Every kernel file ends with `aot_cases() -> Iterator[AotCase]`. Names read "size, what, dtype", for
example "6.9b dual forward bf16": they are the rows of the resource report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """What triton.compile needs to know about one launch, and what the result must satisfy."""

    name: str
    kernel: Any  # triton.runtime.jit.JITFunction
    # every argument of the kernel: "*bf16", "*fp16", "*fp32", "*i64", "i32", "fp32", "constexpr"
    signature: dict[str, str]
    constexprs: dict[str, object]  # a value for each "constexpr" of the signature
    num_warps: int
    num_stages: int = 3  # Triton's default, which the launchers leave as it is
    wide: tuple[str, ...] = ()  # pointers that must be accessed 128 bits a thread ...
    # ... but for exactly these, {"x": {"ld64": 3}}: tails, or all where a row allows no more
    narrow: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    not_aligned: tuple[str, ...] = ()  # pointers and integers that are not multiples of 16
    per_sm: int = 1  # programs of a launch that an SM must hold together: a walk is one wave
    matrix: bool = False  # a matrix instruction must appear
    ordered: bool = False  # a barrier ends each turn of the loop around the loop with atomics
    loop_flops: int = 0  # matrix FLOPs that an iteration of the hot loop needs, 0: not asked
    # bytes a thread, of all architectures or of each; the hot loop has a limit of its own
    spill_budget: int | Mapping[str, int] = 0
    shared_budget: int = 0  # bytes a block, 0: what the chip has
    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")  # that launch it
