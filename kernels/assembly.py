"""What PTX and SASS say about a kernel: access widths, the hot loop, instructions by pipe.

All counts are static. The cycles are lower bounds for one block and one iteration of the hot loop
on one SM; max over the pipes bounds perfect overlap, their sum bounds none.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

# --- PTX ------------------------------------------------------------------------------------------

_MATRIX = {
    "tcgen05": re.compile(r"\btcgen05\.mma\b"),
    "wgmma": re.compile(r"\bwgmma\.mma_async\b"),
    "mma.sync": re.compile(r"(?<!g)\bmma\.sync\b"),
}
_ACCESS = re.compile(r"\b(ld|st|atom|red)\.((?:[\w:]+\.)*global(?:\.[\w:]+)*)\s+(.*)")
_ASYNC_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[.*?\],\s*\[\s*(%\w+).*?\],\s*(\w+)"
)
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_PARAMETER = re.compile(r"_param_(\d+)")


def matrix_instruction(ptx: str) -> str | None:
    """The newest matrix instruction in the PTX: "tcgen05", "wgmma", "mma.sync" or None."""
    return next((name for name, pattern in _MATRIX.items() if pattern.search(ptx)), None)


def global_accesses(ptx: str, pointers: dict[int, str]) -> dict[str, dict[str, int]]:
    """Per pointer argument, how many accesses of each width, as {"x": {"ld128": 4, "st16": 1}}.

    pointers: the pointers among the kernel's parameters, by position. That of an access is found by
    walking its address back through 64-bit registers to the parameters; "?" where none is reached.
    """
    sources: dict[str, set[str]] = defaultdict(set)  # 64-bit register -> registers or "param:i"
    accesses: list[tuple[str, int, str]] = []
    for line in ptx.splitlines():
        text = re.sub(r"^@!?%p\d+\s+", "", line.strip())
        if copied := _ASYNC_COPY.search(text):
            accesses.append(("ld", 8 * int(copied[2], 0), copied[1]))
        elif access := _ACCESS.search(text):
            address = _ADDRESS.search(access[3])
            accesses.append((access[1], _bits(access[2]), address[1] if address else ""))
        elif text.startswith("%") or not text.endswith(";"):
            continue
        elif text.startswith("ld.param"):
            register = re.search(r"%rd\d+", text)
            parameter = _PARAMETER.search(text)
            if register and parameter:
                sources[register[0]].add(f"param:{parameter[1]}")
        elif not text.startswith(("ld.", "st.")):
            written, *read = re.findall(r"%rd\d+", text) or [""]
            sources[written].update(read)
    widths: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, bits, register in accesses:
        widths[_pointer(register, sources, pointers)][f"{kind}{bits}"] += 1
    return {name: dict(counts) for name, counts in sorted(widths.items())}


def _bits(modifiers: str) -> int:
    """Bits a thread of `global.v4.b32` and the like."""
    lanes = re.search(r"\.v(\d)\b", modifiers)
    element = re.findall(r"\.(?:bf|[bfsu])(\d+)(x2)?\b", modifiers)
    width = int(element[-1][0]) * (2 if element[-1][1] else 1) if element else 0
    return width * (int(lanes[1]) if lanes else 1)


def _pointer(register: str, sources: dict[str, set[str]], pointers: dict[int, str]) -> str:
    seen, found, stack = set(), set(), [register]
    while stack:
        node = stack.pop()
        if node.startswith("param:"):
            position = int(node.removeprefix("param:"))
            if position in pointers:  # not an integer that is part of the address
                found.add(pointers[position])
        elif node not in seen:
            seen.add(node)
            stack.extend(sources.get(node, ()))
    return "|".join(sorted(found)) or "?"


def tcgen05_flops(ptx: str) -> int | None:
    """FLOPs of one tcgen05.mma kind::f16, where all share one constant descriptor; else None.

    Instruction descriptor (PTX ISA, tcgen05): bits 17-22 N/8, bits 24-28 M/16; K = 16.
    """
    pattern = r"tcgen05\.mma\.cta_group::1\.kind::f16 \[.*?\], \S+, \S+, (%r\d+),"
    registers = set(re.findall(pattern, ptx))
    values = set()
    for register in registers:
        moved = re.findall(rf"mov\.b32\s+{register}, (\d+);", ptx)
        values.add(int(moved[0]) if len(moved) == 1 else None)
    if len(values) != 1 or None in values:
        return None
    descriptor = values.pop()
    return 2 * ((descriptor >> 24 & 0x1F) * 16) * ((descriptor >> 17 & 0x3F) * 8) * 16


# --- SASS -----------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")

# the first pattern that matches an opcode names its pipe
_PIPES = (
    ("tensor", re.compile(r"(HMMA|IMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")),
    ("mufu", re.compile(r"(MUFU|F2F|F2I|I2F|FRND)\b")),  # one pipe: transcendentals, conversions
    ("fp32", re.compile(r"(FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|FADD2|FMUL2|FFMA2)\b")),
    ("memory", re.compile(r"(LD(?!GDEPBAR)|ST|ATOM|RED|SHFL|UTMA|UBLK|CCTL|SYNCS|MEMBAR)")),
    (
        "control",
        re.compile(
            r"(BRA|BRX|EXIT|RET|CALL|NOP|BAR|BSSY|BSYNC|BREAK|WARP|DEPBAR|ERRBAR|YIELD|FENCE"
            r"|LDGDEPBAR|UTC|U[A-Z]|R2UR|S2UR|S2R|CS2R|ELECT|NANOSLEEP|ACQBULK|PREEXIT|KILL|BPT|VOTEU)"
        ),
    ),
    # IMAD, IADD3, LEA, LOP3, ISETP, SEL and, on the same half-rate pipe, FSETP, FSEL, FMNMX, F2FP
    ("integer", re.compile(r".")),
)
_LANES = {  # results a clock and SM: FP32, integer, MUFU; dense bf16 FLOPs a clock and SM
    80: {"fp32": 64, "integer": 64, "mufu": 16, "tensor": 2048},
    90: {"fp32": 128, "integer": 64, "mufu": 16, "tensor": 4096},
    100: {"fp32": 128, "integer": 64, "mufu": 16, "tensor": 8192},
}
_SHARED_BYTES = 128  # a clock and SM


@dataclass(frozen=True)
class Instruction:
    predicate: str
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        return next(name for name, pattern in _PIPES if pattern.match(self.opcode))

    @property
    def bytes(self) -> int:
        """Bytes a thread of a load or store: 4 unless the opcode says .U8, .64, .128, ..."""
        size = re.search(r"\.[US]?(8|16|32|64|128|256)\b", self.opcode)
        matrices = re.search(r"\.M\w*\.(\d)|\.M(\d)\b", self.opcode)  # LDSM.16.M88.4
        if self.opcode.startswith(("LDSM", "STSM")):
            return 4 * int(matrices[1] or 1) if matrices else 4
        return int(size[1]) // 8 if size else 4

    @property
    def operand_bytes(self) -> int:
        """Bytes that a warpgroup's HGMMA (16-bit operands) reads from shared memory: B, and A
        unless that is in registers."""
        group = re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.opcode)
        if group is None:
            return 0
        m, n, k = (int(g) for g in group.groups())
        a_is_shared = self.operands.split(",")[1].strip().startswith("gdesc")
        return 2 * k * (n + m * a_is_shared)

    @property
    def is_global_access(self) -> bool:
        return self.uses_global or self.opcode.startswith(("UTMALDG", "UTMASTG", "UBLKCP"))

    @property
    def uses_shared(self) -> bool:
        access = self.opcode.startswith(("LDS", "STS", "LDGSTS", "SHFL"))
        return access and self.predicate != "!PT"  # which never runs

    @property
    def uses_global(self) -> bool:
        return self.opcode.startswith(("LDG.", "LDGSTS", "STG."))


def parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of the first function of `nvdisasm -c`, and where each label points."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        if line.startswith(".text."):
            if inside:
                break
            inside = True
        elif not inside:
            continue
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def hot_loop(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction] | None:
    """The innermost loop with the most matrix instructions or, in a kernel without, the most
    global accesses; of equals the shortest, whose tiles need no mask. None when no loop has any."""
    blocks, successors = _control_flow(instructions, labels)

    has_matrix = any(i.pipe == "tensor" for i in instructions)

    def weight(loop: frozenset[int]) -> int:
        body = (i for b in loop for i in instructions[blocks[b][0] : blocks[b][1]])
        return sum(i.pipe == "tensor" if has_matrix else i.is_global_access for i in body)

    loops = [loop for loop in _natural_loops(successors).values() if weight(loop)]
    innermost = [a for a in loops if not any(b < a for b in loops)]
    if not innermost:
        return None

    def length(loop: frozenset[int]) -> int:
        return sum(blocks[b][1] - blocks[b][0] for b in loop)

    chosen = max(innermost, key=lambda loop: (weight(loop), -length(loop)))
    return [i for b in sorted(chosen) for i in instructions[blocks[b][0] : blocks[b][1]]]


def barrier_follows_atomics(instructions: list[Instruction], labels: dict[str, int]) -> bool | None:
    """Whether every way from an atomic to the next turn of the widest loop around it has a barrier.

    Then no thread of a block begins that turn while another still adds. None where no loop holds
    an atomic.
    """
    blocks, successors = _control_flow(instructions, labels)
    atomic = [i.opcode.startswith(("RED", "ATOM")) for i in instructions]
    barrier = [i.opcode.startswith("BAR") for i in instructions]
    holding = {b for b, (start, end) in enumerate(blocks) if any(atomic[start:end])}
    around = {header: loop for header, loop in _natural_loops(successors).items() if loop & holding}
    if not around:
        return None
    widest = max(around, key=lambda header: len(around[header]))
    reached: set[int] = set()
    stack = []
    for block in holding & around[widest]:
        start, end = blocks[block]
        last = max(n for n in range(start, end) if atomic[n])
        if not any(barrier[last:end]):
            stack += successors[block]
    while stack:
        block = stack.pop()
        if block in reached or block not in around[widest]:
            continue
        reached.add(block)
        if not any(barrier[slice(*blocks[block])]):
            stack += successors[block]
    return widest not in reached


def _control_flow(
    instructions: list[Instruction], labels: dict[str, int]
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Basic blocks as [start, end) and the successors of each.

    CALL.REL may return or be a far jump, which ptxas writes so: both ways are taken.
    """
    ends_block = re.compile(r"(BRA|BRX|EXIT|RET|KILL|CALL\.REL)\b")
    starts = {0, *labels.values()}
    starts |= {n + 1 for n, i in enumerate(instructions) if ends_block.match(i.opcode)}
    ordered = sorted(s for s in starts if s < len(instructions))
    blocks = list(zip(ordered, [*ordered[1:], len(instructions)], strict=True))
    block_of = {start: n for n, start in enumerate(ordered)}
    successors: list[list[int]] = []
    for number, (_, end) in enumerate(blocks):
        last = instructions[end - 1]
        out = []
        target = _TARGET.search(last.operands)
        if last.opcode.startswith(("BRA", "CALL.REL")) and target and labels[target[1]] in block_of:
            out.append(block_of[labels[target[1]]])
        # `BRA.U UP0, L` and `BRA.DIV UR4, L` carry their condition as an operand
        conditional = bool(last.predicate) or "," in last.operands
        conditional |= last.opcode.startswith("CALL")
        if (conditional or not ends_block.match(last.opcode)) and number + 1 < len(blocks):
            out.append(number + 1)
        successors.append(out)
    return blocks, successors


def _natural_loops(successors: list[list[int]]) -> dict[int, frozenset[int]]:
    """By loop header, the blocks of the loop; back edges are the edges to a dominator."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for source, out in enumerate(successors):
        for target in out:
            predecessors[target].append(source)
    everything = (1 << len(successors)) - 1
    dominators = [everything] * len(successors)  # bit sets
    if dominators:
        dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for node in range(1, len(successors)):
            common = everything
            for source in predecessors[node]:
                common &= dominators[source]
            common |= 1 << node
            if common != dominators[node]:
                dominators[node], changed = common, True
    reachable = _reachable(successors)
    loops: dict[int, set[int]] = defaultdict(set)
    for source in reachable:
        for header in successors[source]:
            if dominators[source] >> header & 1:
                loops[header] |= _body(header, source, predecessors)
    return {header: frozenset(loop) for header, loop in loops.items()}


def _reachable(successors: list[list[int]]) -> set[int]:
    seen: set[int] = set()
    stack = [0] if successors else []
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(successors[node])
    return seen


def _body(header: int, latch: int, predecessors: list[list[int]]) -> set[int]:
    body, stack = {header}, [latch]
    while stack:
        node = stack.pop()
        if node not in body:
            body.add(node)
            stack.extend(predecessors[node])
    return body


def hot_loop_report(sass: str, arch: int, warps: int, tcgen05: int | None) -> dict[str, object]:
    """Instructions a warp by pipe and cycles a block by pipe, for one iteration of the hot loop.

    tcgen05: FLOPs of one UTC*MMA (`tcgen05_flops`). "loop" is False where the kernel has none and
    the counts are of one pass through all of it. A kernel that branches is counted as if it took
    every branch. "bytes_per_cycle" is what the bound lets an SM move; a kernel is held back by it
    where memory gives more (HBM: 4.3 TB/s over 132 SMs at 1.83 GHz is 17.8, measured on an H200).
    """
    instructions, labels = parse_sass(sass)
    body = hot_loop(instructions, labels)
    counted = body if body is not None else _without_padding(instructions)
    pipes = Counter(i.pipe for i in counted)
    flops = _flops(counted, warps, tcgen05)
    lanes = _LANES[arch]
    shared = 32 * sum(i.bytes for i in counted if i.uses_shared)  # bytes a warp
    shared += sum(i.operand_bytes for i in counted) / 4  # a warpgroup reads them once
    cycles = {
        "tensor": None if flops is None else flops / lanes["tensor"],
        **{p: pipes[p] * warps * 32 / lanes[p] for p in ("mufu", "fp32", "integer")},
        "shared": shared * warps / _SHARED_BYTES,
        "issue": len(counted) * warps / 4,
    }
    known = {pipe: c for pipe, c in cycles.items() if c is not None}
    moved = 32 * warps * sum(i.bytes for i in counted if i.uses_global)
    bound = max(known.values())
    return {
        "loop": body is not None,
        "instructions": {**dict(sorted(pipes.items())), "issue": len(counted)},
        "global_bytes": moved,
        "bytes_per_cycle": moved / bound,
        "flops": flops,
        "ordered": barrier_follows_atomics(instructions, labels),
        "spills": sum(i.opcode.startswith(("LDL", "STL")) for i in counted) if body else 0,
        "selects": sum(i.opcode == "FSEL" for i in counted),
        "cycles": cycles,
        "bound": bound,
        "bound_by": max(known, key=known.__getitem__),
    }


def _without_padding(instructions: list[Instruction]) -> list[Instruction]:
    """Up to the branch to itself that follows the last EXIT."""
    ends = [n for n, i in enumerate(instructions) if i.opcode == "EXIT"]
    return [i for i in instructions[: ends[-1] + 1 if ends else None] if i.opcode != "NOP"]


def _flops(body: list[Instruction], warps: int, tcgen05: int | None) -> float | None:
    """Matrix FLOPs a block. HMMA.mnk is a warp's, HGMMA.64xNxK four warps', UTC*MMA the block's."""
    total = 0.0
    for instruction in body:
        if instruction.pipe != "tensor":
            continue
        if group := re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode):
            m, n, k = (int(g) for g in group.groups())
            total += 2 * m * n * k * warps / 4
        elif single := re.search(r"HMMA\.(16)(8)(16|8)\b", instruction.opcode):
            m, n, k = (int(g) for g in single.groups())
            total += 2 * m * n * k * warps
        elif instruction.opcode.startswith("UTCHMMA") and tcgen05 is not None:
            total += tcgen05
        else:
            return None
    return total
