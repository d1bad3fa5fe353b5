"""Which attention a GPU runs: the project's kernel, or torch's where that measured faster here.

With deterministic gradients there is one candidate, ours: torch's flash and cuDNN backends, as they
are by default, add dq in any order. Without, every shape is measured once, forward and backward
together, on first use; the choice is kept in a file by GPU and versions, and said in the log.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.errors import TritonError

from pythia_fast.data.files import publish
from pythia_fast.kernels import attention, attention_decode, reference, rotary
from pythia_fast.kernels.attention_decode import QUERIES
from pythia_fast.kernels.attention_tiles import DTYPES, HEAD_DIMS, turns
from pythia_fast.progress import say

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""qkv (B, T, H, 3·D), consumed, cos and sin (≥T, R/2) -> context (B, T, H·D)."""
Clock = Callable[[Callable[[], None]], float]
REPEATS = 10


def of_torch(qkv: Tensor, cos: Tensor, sin: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """Torch's attention over the rotation kernel; backend None lets torch choose."""
    turned = rotary.rotary(qkv, cos, sin)
    if backend is None:
        return reference.attention(turned)
    q, k, v = (t.transpose(1, 2) for t in turned.chunk(3, dim=-1))  # (B, H, T, D)
    with sdpa_kernel(backend):
        ctx = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return ctx.transpose(1, 2).flatten(-2)


class Fastest:
    """The candidate that took least time on a shape, ours where another's gain is below `margin`.

    clock(call) -> milliseconds of one call; cache: a JSON file of earlier choices, by `machine`.
    """

    def __init__(
        self,
        candidates: Mapping[str, Attention],
        clock: Clock,
        cache: Path,
        machine: str,
        margin: float = 0.02,
    ) -> None:
        self.candidates, self.clock, self.cache = candidates, clock, cache
        self.machine, self.margin = machine, margin
        kept = _read(cache).get(machine, {})
        self.chosen = {shape: name for shape, name in kept.items() if name in candidates}

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = " ".join(map(str, (*qkv.shape, str(qkv.dtype).removeprefix("torch."))))
        if shape not in self.chosen:
            self.chosen[shape] = self._measure(shape, qkv, cos, sin)
        return self.candidates[self.chosen[shape]](qkv, cos, sin)

    def _measure(self, shape: str, qkv: Tensor, cos: Tensor, sin: Tensor) -> str:
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        short = False
        for name, candidate in self.candidates.items():
            try:
                times[name] = self._time(candidate, qkv, cos, sin)
            except torch.OutOfMemoryError:  # of this moment, not of the shape
                refused[name], short = "out of memory", True
            except (RuntimeError, TritonError) as error:  # a shape that it does not take
                refused[name] = (str(error).splitlines() or ["refused"])[0]
        if not times:
            raise RuntimeError(f"attention of {shape}: " + "; ".join(refused.values()))
        ours = next(iter(self.candidates))
        best = min(times, key=times.__getitem__)
        if ours in times and times[ours] <= (1 + self.margin) * times[best]:
            best = ours
        listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
        listed += "".join(f", {name} refused: {why}" for name, why in refused.items())
        say(f"attention of {shape}, forward and backward: {listed}; {best} runs")
        if not short:
            self._keep(shape, best)
        return best

    def _keep(self, shape: str, name: str) -> None:
        kept = _read(self.cache)
        kept.setdefault(self.machine, {})[shape] = name
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with publish(self.cache) as file:
                file.write(json.dumps(kept, indent=1).encode())
        except OSError as error:  # a home that cannot be written: measured again next time
            say(f"{self.cache}: the choice of attention is not kept ({error.strerror})")

    def _time(self, candidate: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> float:
        """Milliseconds of forward and backward on N(0, 1) values of the same shape."""
        generator = torch.Generator(qkv.device).manual_seed(0)  # the run's own stays where it is

        def normal(*size: int) -> Tensor:
            return torch.empty(size, dtype=qkv.dtype, device=qkv.device).normal_(
                generator=generator
            )

        with torch.enable_grad():
            leaf = normal(*qkv.shape).requires_grad_()
            batch, positions, heads, packed = qkv.shape
            above = normal(batch, positions, heads * packed // 3)

            def call() -> None:
                torch.autograd.grad(candidate(leaf * 1, cos, sin), leaf, above)

            return self.clock(call)


def select(device: torch.device, deterministic: bool) -> Attention:
    """attention(qkv, cos, sin) for a device; deterministic: its gradient repeats bit for bit.

    Where no kernel fits (head dim, dtype, rotary dims) torch's runs, as deterministic as torch is.
    """
    ours = partial(attention.attention, deterministic=deterministic)
    fastest: Attention = ours
    if device.type == "cuda" and not deterministic:
        torch_backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        candidates = {"ours": ours} | {
            name: partial(of_torch, backend=backend) for name, backend in torch_backends.items()
        }
        fastest = Fastest(candidates, cuda_clock, cache_file(), _machine(device))

    def attend(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        d = qkv.shape[-1] // 3
        taken = qkv.dtype in DTYPES and d in HEAD_DIMS and turns(d, cos.shape[1])
        return (fastest if taken else of_torch)(qkv, cos, sin)

    return attend


def decode(
    q: Tensor, keys: Tensor, values: Tensor, filled: int, first: Tensor | None = None
) -> Tensor:
    """`attention_decode` by the kernel for up to 16 queries that it takes, else by torch."""
    taken = q.dtype in DTYPES and q.shape[-1] in HEAD_DIMS and q.shape[1] <= QUERIES
    function = attention_decode.attention_decode if taken else reference.attention_decode
    return function(q, keys, values, filled, first)


def cuda_clock(call: Callable[[], None]) -> float:
    """Median milliseconds of REPEATS calls on the GPU, after two that are not counted."""
    milliseconds = []
    for repeat in range(2 + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 2:
            milliseconds.append(start.elapsed_time(end))
    return statistics.median(milliseconds)


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pythia-fast" / "attention.json"


def _machine(device: torch.device) -> str:
    import triton

    try:
        own = version("pythia-fast")
    except PackageNotFoundError:
        own = "source"
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    sources = sorted(Path(attention.__file__).parent.glob("attention*.py"))
    digest = sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    versions = f"torch {torch.__version__}, cudnn {cudnn}, triton {triton.__version__}"
    return f"{name}, {versions}, pythia-fast {own} {digest}"


def _read(cache: Path) -> dict[str, dict[str, str]]:
    """What the file holds; nothing where it is absent or broken, since it can be measured again."""
    try:
        kept = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
