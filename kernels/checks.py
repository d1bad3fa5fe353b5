"""What every launcher asks of its arguments, before anything is launched.

Each check raises TypeError (dtype, or no tensor at all) or ValueError (device, rank, shape, stride)
with one line that names the argument, what it is and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)

# Triton reads TRITON_INTERPRET when a kernel is decorated, so once, at import.
INTERPRETED: bool = triton.knobs.runtime.interpret


def check(
    tensor: Tensor,
    name: str,
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    rank: int | None = None,
    shape: Sequence[int | None] | None = None,
    last_stride: int | None = 1,
    device: torch.device | None = None,
) -> None:
    """`tensor` can be given to a kernel as it stands.

    shape: the sizes asked for, None where any will do. last_stride: the stride of the last
    dimension (elements), None where any will do. device: where the other arguments are.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: dtype {str(tensor.dtype).removeprefix('torch.')}, not {allowed}")
    _check_device(tensor, name, device)
    if rank is not None and tensor.dim() != rank:
        raise ValueError(f"{name}: rank {tensor.dim()} {tuple(tensor.shape)}, expected {rank}")
    if shape is not None and tensor.shape != shape and not _matches(tensor.shape, shape):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({wanted})")
    if last_stride is None or tensor.dim() == 0 or tensor.shape[-1] < 2:
        return
    if tensor.stride(-1) != last_stride:
        raise ValueError(
            f"{name}: strides {tensor.stride()}, the last dimension must have stride {last_stride}"
        )


def check_rows(
    tensor: Tensor,
    name: str,
    columns: int,
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    device: torch.device | None = None,
) -> Tensor:
    """The view (M, columns) of a (..., columns) tensor whose rows lie one stride apart."""
    check(tensor, name, dtypes=dtypes, device=device)
    if tensor.dim() == 0 or tensor.shape[-1] != columns:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected (..., {columns})")
    try:
        return tensor.view(tensor.numel() // columns, columns) if columns else tensor.flatten(0, -2)
    except RuntimeError:
        raise ValueError(
            f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)} give its rows no"
            " single stride; pass a contiguous tensor or columns of one"
        ) from None


def check_vectors(vectors: dict[str, Tensor], like: Tensor) -> None:
    """Weights and biases (h,) for `like` (..., h), by argument name: all of one floating dtype."""
    dtypes: Sequence[torch.dtype] = FLOATING
    for name, vector in vectors.items():
        check(vector, name, dtypes=dtypes, shape=like.shape[-1:], device=like.device)
        dtypes = (vector.dtype,)


def grad_rows(grad: Tensor, name: str, like: Tensor) -> Tensor:
    """The gradient of a tensor shaped `like` (..., h) as (M, h) with unit inner stride.

    Copied where autograd hands over other strides (an expanded scalar, a transpose).
    """
    check(grad, name, shape=like.shape, last_stride=None, device=like.device)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    return grad.reshape(-1, like.shape[-1])


def rows_overlap(tensor: Tensor, row: int) -> bool:
    """Whether rows of `row` elements, one for each index of the first two dims, share any."""
    extent = row
    counted = zip(tensor.shape[:2], tensor.stride(), strict=False)
    for count, stride in sorted(((n, s) for n, s in counted if n > 1), key=lambda pair: pair[1]):
        if stride < extent:
            return True
        extent += stride * (count - 1)
    return False


def _matches(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(
        w is None or n == w for n, w in zip(shape, wanted, strict=True)
    )


def _check_device(tensor: Tensor, name: str, device: torch.device | None) -> None:
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, the other arguments are on {device}")
    if tensor.device.type == "cuda":
        current = torch.cuda.current_device()
        if tensor.device.index != current:
            raise ValueError(f"{name}: on {tensor.device}, the current device is cuda:{current}")
    elif tensor.device.type != "cpu" or not INTERPRETED:
        raise ValueError(
            f"{name}: on {tensor.device}; a Triton kernel needs a CUDA tensor"
            " (or a CPU tensor, with TRITON_INTERPRET=1 set before the kernels are imported)"
        )
