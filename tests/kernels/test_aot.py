"""The ahead-of-time report: it finds each fault, and its figures agree with hand counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import aot_faults
import pytest
from kernel_proof import Mutant, assert_killed

from pythia_fast.kernels import aot, assembly

pytest.importorskip("triton.backends.nvidia")

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """Every case of tests/support/aot_faults.py on every architecture."""
    found = aot.compile_all(["aot_faults"], workers=1)
    return {(row["case"], row["arch"]): row for row in found}


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("good copy", None),
        ("good matmul", None),
        ("loop", None),
        ("narrow load", "x: accesses narrower than 128 bits (8 x ld16), expected none"),
        ("no such pointer", "z: no access of 128 bits found"),
        ("tail kept", None),
        ("tail not promised", "y: accesses narrower than 128 bits (1 x st32), expected none"),
        ("main block narrow", "x: accesses narrower than 128 bits (10 x ld16), expected 1 x ld32"),
        ("only a tail", "x: no access of 128 bits found"),
        ("rows", None),
        ("rows off their alignment", "x: accesses narrower than 128 bits ("),
        ("no matrix instruction", "no matrix instruction in the PTX"),
        ("too much shared memory", "bytes of shared memory, the chip has"),
        ("fits often enough", None),
        ("does not fit", "16 programs fit an SM, 17 are launched for each"),
        ("spills", "bytes a thread, budget 0"),
        ("spills within budget", None),
        ("does not compile", "arange's range must be a power of 2"),
    ],
)
def test_violations(rows: dict, case: str, fault: str | None, arch: str) -> None:
    lines = rows[case, arch]["violations"]
    if fault is None:
        assert lines == []
    else:
        assert len(lines) == 1 and fault in lines[0], lines


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_figures_against_hand_counts(rows: dict, arch: str) -> None:
    """128 x 128 x 64 bf16 a step: 2·128·128·64 FLOPs, (128 + 128)·64·2 bytes read."""
    row = rows["good matmul", arch]
    rate = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}[arch]
    assert row["matrix"] == MATRIX[arch]
    assert set(row["accesses"]) == {"a", "b", "c"}
    assert row["hot_loop"]["loop"]
    assert row["hot_loop"]["cycles"]["tensor"] == 2 * 128 * 128 * 64 / rate
    assert row["hot_loop"]["global_bytes"] == (128 + 128) * 64 * 2
    copied = rows["good copy", arch]
    assert copied["accesses"] == {"x": {"ld128": 1}, "y": {"st128": 1}}
    assert copied["hot_loop"]["global_bytes"] == 1024 * 2 * 2 and not copied["hot_loop"]["loop"]
    summed = rows["loop", arch]["hot_loop"]  # an unrolled iteration holds whole source iterations
    assert summed["loop"] and summed["global_bytes"] % (512 * 4) == 0
    additions = summed["global_bytes"] // 4 // (32 * 4)  # a warp of four, one per element loaded
    assert summed["instructions"]["fp32"] in (additions, additions // 2)  # FADD, or packed FADD2


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "arch", "programs"),
    [
        (32, 4, 0, "sm_90", 16),  # 64 warps
        (32, 1, 0, "sm_90", 32),  # blocks
        (65, 4, 0, "sm_90", 7),  # 72 · 128 registers
        (255, 8, 0, "sm_80", 1),
        (40, 4, 16384, "sm_80", 9),  # 164 KB / (16 + 1)
        (40, 4, 16384, "sm_90", 12),  # registers again
        (None, 4, 0, "sm_90", None),
    ],
)
def test_resident(
    registers: int | None, warps: int, shared: int, arch: str, programs: int | None
) -> None:
    row = {"registers": registers, "num_warps": warps, "shared_bytes": shared, "arch": arch}
    assert aot.resident(row) == programs


def test_products_beyond_what_the_algebra_needs(rows: dict) -> None:
    """Counted where each instruction says its shape: on sm_90."""
    found = {arch: rows["padded product", arch]["violations"] for arch in aot.ARCHITECTURES}
    assert found["sm_90"] == ["the hot loop issues 2097152.0 FLOPs, 1048576 are needed"]
    assert not found["sm_80"] and not found["sm_100"]


def test_a_case_is_compiled_for_its_architectures(rows: dict) -> None:
    assert [arch for case, arch in rows if case == "mask in the loop"] == ["sm_90"]


def test_a_mask_in_the_loop(rows: dict) -> None:
    (line,) = rows["mask in the loop", "sm_90"]["violations"]
    assert line.startswith("the hot loop masks (")


def test_a_loop_that_spills(rows: dict) -> None:
    """One access to local memory in a hundred instructions is let pass, more are not."""
    case = next(c for c in aot_faults.aot_cases() if c.name == "good matmul")
    row = rows["good matmul", "sm_90"]
    issue = row["hot_loop"]["instructions"]["issue"]
    for spills, lines in ((issue // 100, 0), (issue // 100 + 1, 1)):
        loop = row["hot_loop"] | {"spills": spills}
        assert len(aot.violations(case, row | {"hot_loop": loop})) == lines


def test_operands_that_wgmma_reads_from_shared_memory(rows: dict) -> None:
    """A and B of each of two warpgroups, 64 x 64 and 64 x 128 bf16 a step, and the tiles' way in."""
    loop = rows["good matmul", "sm_90"]["hot_loop"]
    operands = 2 * (64 * 64 + 64 * 128) * 2
    loaded = (128 + 128) * 64 * 2
    assert loop["cycles"]["shared"] == (operands + loaded) / 128


LOOPS = """
.text.kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_1:
        /*0020*/                   {before} ;
        /*0030*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R4.64], R5 ;
        /*0040*/                   {after} ;
        /*0050*/              @P0 BRA `(.L_x_1) ;
        /*0060*/                   {outside} ;
        /*0070*/              @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("where", "ordered"), [("before", False), ("after", True), ("outside", True), (None, False)]
)
def test_barrier_between_atomics_and_the_next_turn(where: str | None, ordered: bool) -> None:
    places = dict.fromkeys(("before", "after", "outside"), "NOP")
    if where:
        places[where] = "BAR.SYNC.DEFER_BLOCKING 0x0"
    code = assembly.parse_sass(LOOPS.format(**places))
    assert assembly.barrier_follows_atomics(*code) is ordered
    without = LOOPS.replace("RED.E.ADD", "FADD").format(**places)
    assert assembly.barrier_follows_atomics(*assembly.parse_sass(without)) is None


def test_budgets_of_an_architecture_and_of_shared_memory(rows: dict) -> None:
    case = next(c for c in aot_faults.aot_cases() if c.name == "good matmul")
    row = rows["good matmul", "sm_80"] | {"spill_bytes": 9, "shared_bytes": 1000}
    for budget, shared, lines in (({"sm_80": 9}, 0, 0), ({"sm_80": 8}, 0, 1), (9, 999, 1)):
        own = dataclasses.replace(case, spill_budget=budget, shared_budget=shared)
        assert len(aot.violations(own, row)) == lines


def test_rows_are_json_lines(rows: dict) -> None:
    for row in rows.values():
        assert json.loads(json.dumps(row)) == row


PTX = """
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	ld.param.b64 	%rd3, [k_param_2];
	ld.param.s32 	%rd9, [k_param_3];
	add.s64 	%rd4, %rd1, %rd9;
	mov.b64 	%rd5, %rd4;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd5 + 0 ];
	@!%p1 ld.global.L1::evict_first.v2.b64 { %rd20, %rd21 }, [ %rd4 + 16 ];
	ld.global.b64 	{ %rd6 }, [ %rd3 + 0 ];
	ld.shared.b64 	%rd8, [%rd3];
	mad.lo.s64 	%rd7, %rd6, %rd8, %rd2;
	st.global.b16 [ %rd7 + 0 ], { %rs1 };
	cp.async.cg.shared.global [ %r24 + 0 ], [ %rd5 + 0 ], 0x10, %r25;
	atom.global.gpu.acq_rel.add.f32 %r9, [ %rd7 + 0 ], %r8;
	ld.shared.v4.b32 	{ %r1, %r2, %r3, %r4 }, [%r7];
"""


def check_accesses(module: ModuleType) -> None:
    """An access belongs to the pointer its address comes from, not to a loaded index."""
    assert module.global_accesses(PTX, {0: "x", 1: "y", 2: "index"}) == {
        "x": {"ld128": 3},
        "y": {"st16": 1, "atom32": 1},
        "index": {"ld64": 1},
    }


SASS = """
.text.k:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R8, R8, R4 ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDS.64 R10, [R1] ;
        /*0050*/                   MUFU.EX2 R9, R9 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR16], R20 ;
        /*0090*/              @!P3 BRA `(.L_x_2) ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def check_hot_loop(module: ModuleType) -> None:
    """It holds its out-of-line wait, not the exit. The jump back from the wait is no loop of its
    own; the wait's spin is one, inside, and has no loads."""
    assert len(module.parse_sass(SASS)[0]) == 12
    report = module.hot_loop_report(SASS, 90, warps=4, tcgen05=None)
    assert report["loop"]
    assert report["instructions"] == {
        "control": 4, "fp32": 1, "memory": 3, "mufu": 1, "issue": 9,
    }  # fmt: skip
    assert report["cycles"] == {
        "tensor": 0, "mufu": 8, "fp32": 1, "integer": 0, "shared": 8, "issue": 9,
    }  # fmt: skip
    assert (report["bound"], report["bound_by"]) == (9, "issue")
    assert report["bytes_per_cycle"] == 4 * 32 * 16 / 9
    straight = module.hot_loop_report(SASS.replace("@P0 BRA `(.L_x_0)", "NOP"), 90, 4, None)
    assert not straight["loop"]


FILE = "kernels/assembly.py"
MUTANTS = [
    Mutant("loads pass their address on", FILE, '("ld.", "st.")', '("st.",)'),
    Mutant("integers taken for pointers", FILE, "if position in pointers:", "if True:"),
    Mutant("width without its lanes", FILE, "(int(lanes[1]) if lanes else 1)", "1"),
    Mutant("asynchronous copies in bits", FILE, "8 * int(copied[2], 0)", "int(copied[2], 0)"),
    Mutant("predicates end nothing", FILE, "conditional or not ends", "not ends"),
    Mutant(
        "every jump back is a loop",
        FILE,
        "if dominators[source] >> header & 1:",
        "if header <= source:",
    ),
    Mutant("bytes of one lane", FILE, "shared = 32 * sum", "shared = sum"),
    Mutant("one scheduler", FILE, "len(counted) * warps / 4", "len(counted) * warps"),
]


def test_assembly() -> None:
    check_accesses(assembly)
    check_hot_loop(assembly)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    def check(module: ModuleType) -> None:
        check_accesses(module)
        check_hot_loop(module)

    assert_killed(mutant, check, tmp_path)


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "kernel_modules", lambda: ["aot_faults"])
    assert aot.main(["--arch", "sm_90", "--only", "good", "--json", "--workers", "1"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["case"] for row in printed} == {"good copy", "good matmul"}

    assert aot.main(["--arch", "sm_90", "--only", "narrow load", "--workers", "1"]) == 1
    output = capsys.readouterr()
    assert "narrow load" in output.out  # the table
    assert output.err.endswith(
        "aot_faults: narrow load: sm_90: x: accesses narrower than 128 bits (8 x ld16),"
        " expected none\n"
    )
    assert aot.main(["--only", "nothing of this name", "--workers", "1"]) == 2


def test_sample_crosses_cases_and_architectures() -> None:
    rows = list(aot.compile_all(["aot_faults"], only="o", every=8, workers=1))
    assert {r["arch"] for r in rows} == set(aot.ARCHITECTURES)
    assert {r["case"] for r in rows} >= {"good copy", "narrow load"} and len(rows) < 9


def test_every_kernel_file_with_cases_is_found() -> None:
    directory = Path(aot.__file__).parent
    for module in aot.kernel_modules():
        assert (directory / f"{module.rpartition('.')[2]}.py").exists()
    assert f"{aot.PACKAGE}.aot" not in aot.kernel_modules()


def test_sample_of_the_kernels() -> None:
    """One compilation in 41 (a prime, so files, architectures and dtypes take turns)."""
    rows = list(aot.compile_all(aot.kernel_modules(), every=41, workers=1))
    assert {row["arch"] for row in rows} == set(aot.ARCHITECTURES)
    assert not [(row["case"], row["arch"], row["violations"]) for row in rows if row["violations"]]
