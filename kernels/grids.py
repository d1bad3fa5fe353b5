"""The launch grid of every kernel, as its launcher computes it, for callers without Python.

A formula is of integer arguments and constants of the kernel, PER_SM (programs that an SM holds
together, `AotCase.per_sm`) and SMS (of the device), with cdiv, min, * + - and // (of numbers that
are not negative). A name that is none of these is an argument of the grid alone. The tests compare
every formula with the grid of the launcher.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

_WALK = "min(PER_SM * SMS, cdiv(M, ROWS))"
_LOGITS = "min(M, PER_SM * SMS)"
_POSITIONS = ("cdiv(T, BLOCK_T) * H", "B")
_IDS = ("cdiv(M, CHUNK)", "H // BLOCK")

GRIDS: dict[str, tuple[str, ...]] = {
    "_adamw_kernel": ("cdiv(n, BLOCK)",),
    "_adamw_lean_kernel": ("cdiv(first + n, 4 * GROUP) - first // (4 * GROUP)",),
    "_adamw_list_kernel": ("CHUNKS",),
    "_attention_bwd_delta_kernel": _POSITIONS,
    "_attention_bwd_dq_kernel": ("cdiv(T, BLOCK_M) * heads",),
    "_attention_bwd_kernel": ("segments * heads",),
    "_attention_bwd_sum_kernel": _POSITIONS,
    "_attention_combine_kernel": ("B * H",),
    "_attention_decode_kernel": ("B * H", "cdiv(filled, stretch)"),
    "_attention_fwd_kernel": ("cdiv(T, BLOCK_M) * heads",),
    "_cross_entropy_bwd_kernel": (_LOGITS,),
    "_cross_entropy_combine_kernel": ("cdiv(M, BLOCK)",),
    "_cross_entropy_fwd_kernel": (_LOGITS,),
    "_cross_entropy_grad_kernel": (_LOGITS,),
    "_cross_entropy_stats_kernel": (_LOGITS,),
    "_embedding_chunks_kernel": _IDS,
    "_embedding_runs_kernel": _IDS,
    "_gelu_bwd_kernel": ("P * cdiv(N, BLOCK_N)",),
    "_gelu_fwd_kernel": ("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)",),
    "_layer_norm_bwd_kernel": (_WALK,),
    "_layer_norm_fwd_kernel": ("cdiv(M, ROWS)",),
    "_parallel_residual_bwd_kernel": (_WALK,),
    "_parallel_residual_fwd_kernel": ("cdiv(M, ROWS)",),
    "_root_sum_kernel": ("1",),
    "_rotary_kernel": ("cdiv(T, BLOCK_T)", "cdiv(H, BLOCK_H)", "B"),
    "_square_sum_kernel": ("min(cdiv(n, BLOCK), 2048)",),
    "_sum_partials_kernel": ("cdiv(N, BLOCK_N)",),
}
_FUNCTIONS = ("cdiv", "min")
DEVICE = ("PER_SM", "SMS")
_OPERATORS = {ast.Mult: "*", ast.Add: "+", ast.Sub: "-", ast.FloorDiv: "/"}


def names(formula: str) -> list[str]:
    """The arguments and constants of a formula, in order."""
    found = [n.id for n in ast.walk(ast.parse(formula)) if isinstance(n, ast.Name)]
    return [n for n in dict.fromkeys(found) if n not in (*_FUNCTIONS, *DEVICE)]


def in_c(formula: str, terms: Mapping[str, str]) -> str:
    """The formula as an expression of C++ in 64 bits, a name replaced by its term."""
    return _in_c(ast.parse(formula, mode="eval").body, terms)


def _in_c(node: ast.expr, terms: Mapping[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return f"int64_t{{{node.value}}}"
    if isinstance(node, ast.Name):
        return terms[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = ", ".join(_in_c(a, terms) for a in node.args)
        return f"{'std::min' if node.func.id == 'min' else node.func.id}({arguments})"
    if isinstance(node, ast.BinOp):
        left, right = _in_c(node.left, terms), _in_c(node.right, terms)
        return f"({left} {_OPERATORS[type(node.op)]} {right})"
    raise ValueError(f"no part of a grid's formula: {ast.unparse(node)}")
