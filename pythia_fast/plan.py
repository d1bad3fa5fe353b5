"""What a model costs before it runs: FLOPs, bytes, memory, and bounds of its speed.

Nothing here is measured on this project's kernels. Two bounds of the speed on one GPU, both with
all kernels of a step in a row, elementwise work fused as far as it can be, and the optimizer:

    A  products and attention at the rate of a large sustained product, the rest at that of a copy
    B  the same with rates that somebody has published or that follow from the shapes: products of
       contraction length K at K/(K + 96) of it, attention at the best rate published for 2,048
       causal positions, the rest at 92 % of a copy, 1 % for launches and tails

Letters: L layers, h hidden, D head dim, V vocabulary, T positions of a row, N parameters. Imports
no torch: `pythia-fast plan` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pythia_fast.config import Config, Model
from pythia_fast.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """Rates of one card, FLOP/s and bytes/s (read plus written), and its memory in bytes."""

    name: str
    device: str  # as the driver names it: the PCIe and NVL cards of a name have other peaks
    peak: float  # bf16, dense, as the vendor states it: the denominator of MFU
    product: float  # sustained bf16 product of N(0, 1) data
    copy: float  # device-to-device copy
    memory: float  # what a process can allocate


GPUS = {
    # product and copy read off an H200 (8192³; 2 GB); stas00/ml-engineering has 794.5 TFLOP/s
    "H200": Gpu("H200", "NVIDIA H200", 989e12, 790e12, 4.3e12, 149e9),
    # product: stas00/ml-engineering, "maximum achievable matmul FLOPS"; copy: QuACK's README
    "H100": Gpu("H100", "NVIDIA H100 80GB HBM3", 989e12, 794.5e12, 3.01e12, 84e9),
    # product: H. He, "Strangely, matrix multiplications on GPUs run faster...", N(0, 1) data; copy:
    # 0.9 of the vendor's 2,039 and 1,555 GB/s, the share that the two above reach of theirs
    "A100": Gpu("A100", "NVIDIA A100-SXM4-80GB", 312e12, 257e12, 1.84e12, 84e9),
    "A100-40GB": Gpu("A100-40GB", "NVIDIA A100-SXM4-40GB", 312e12, 257e12, 1.40e12, 41.5e9),
}


def card(device: str) -> Gpu | None:
    """The card that the driver calls `device`; None where its rates are not known here."""
    return next((gpu for gpu in GPUS.values() if gpu.device == device), None)


# Best published rates of causal attention at T = 2048, FLOP/s (forward, backward), by head dim.
# Forward: FlashAttention-3 (arXiv 2407.08608) for 64 and 256, TLX (facebookexperimental/triton)
# for 128; backward: cuDNN 9.19 on an H200 for 128. The other backward rates and head dim 80 are
# estimates from the non-causal figures of the same sources.
ATTENTION_RATES = {
    64: (371e12, 310e12),
    80: (380e12, 310e12),
    128: (560e12, 370e12),
    256: (537e12, 370e12),
}
ATTENTION_CARDS = ("H200", "H100")  # that these rates were published of
PIPELINE_FILL = 96  # K of a product's loop that fills and drains its pipeline instead of computing
STREAMING = 0.92  # of a copy, which a kernel bound by memory can reach
OVERHEAD = 1.01

# elements of h a token and layer outside of products and attention, each fused into its neighbour
LAYER_ELEMENTS = {
    "dual LayerNorm forward: x in, two outputs": 3,
    "residual read in the epilogue of the output product": 1,
    "GELU's input kept beside its output": 4,
    "GELU backward reads its input": 4,
    "dual LayerNorm backward: two gradients, x and dy in, dx out": 5,
}
ATTENTION_ELEMENTS = 4 + 8  # q k v o forward; q k v o do dq dk dv backward
ACTIVATION_ELEMENTS = 15  # kept for the backward: x, two norms, q k v, context, 4h and GELU of it
RECOMPUTED_ELEMENTS = 6  # of those, two norms and GELU's output can be formed again (selective)

# bytes a parameter, beside the gradient's
ADAM_TRAFFIC = 26  # fp32 master and moments read and written, 16-bit weight written
STATES = 14  # 16-bit weight, fp32 master, two fp32 moments
GRADIENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # of the accumulated gradient, by its dtype
LEAN_STATES = 8  # bf16 weight, 16-bit remainder, bf16 moments (optimizer.states = "lean")


# --- FLOPs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of one token of training, forward and backward.

    MFU in causal counting divides `causal` by the peak; the PaLM appendix (arXiv 2204.02311) and
    nanoGPT count the masked half of attention too, which is `palm`; `executed` has the five
    products of attention's backward, one of them a recomputation.
    """

    linear: float
    causal: float
    palm: float
    executed: float


def matmul_parameters(m: Model) -> int:
    """12·L·h² + V·h: weights that are multiplied with; the embedding is looked up."""
    return 12 * m.layers * m.hidden**2 + m.vocab_size * m.hidden


def flops(m: Model, seq_len: int) -> Flops:
    """Two FLOPs a weight and token forward, four backward; a causal product of attention: L·h·T."""
    linear = 6.0 * matmul_parameters(m)
    product = float(m.layers * m.hidden * seq_len)  # of six: q kᵀ and p v, once and twice
    return Flops(linear, linear + 6 * product, linear + 12 * product, linear + 7 * product)


def mfu(per_token: float, tokens_per_s: float, gpu: Gpu) -> float:
    """Share of the peak that tokens_per_s of per_token FLOPs are."""
    return per_token * tokens_per_s / gpu.peak


# --- bytes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Necessary bytes a token beside the products, in 16 bits; attention's hide under its sums."""

    layers: float
    cross_entropy: float  # logits read once, their gradient written once, in place
    optimizer: float
    ends: float  # embedding: row read and written, gradient added in fp32; last norm: 2h and 3h
    attention: float

    @property
    def streamed(self) -> float:
        return self.layers + self.cross_entropy + self.optimizer + self.ends


def traffic(m: Model, step_tokens: int, gradient: int = 4) -> Traffic:
    """step_tokens: of one optimizer step on one GPU. gradient: bytes of one, read twice a step."""
    width = 2 * m.hidden  # bytes
    return Traffic(
        layers=width * m.layers * sum(LAYER_ELEMENTS.values()),
        cross_entropy=2 * 2 * m.vocab_size,
        optimizer=(ADAM_TRAFFIC + 2 * gradient) * m.parameters / step_tokens,
        ends=(2 + 1 + 4) * width + 5 * width,
        attention=width * m.layers * ATTENTION_ELEMENTS,
    )


# --- bounds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Seconds a token of each kind of kernel, one after the other."""

    products: float
    attention: float
    memory: float
    overhead: float = 1.0

    @property
    def seconds(self) -> float:
        return self.overhead * (self.products + self.attention + self.memory)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.seconds

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of products, attention and memory."""
        kinds = (self.products, self.attention, self.memory)
        return tuple(k / sum(kinds) for k in kinds)  # type: ignore[return-value]


def bound_a(m: Model, seq_len: int, step_tokens: int, gpu: Gpu, gradient: int = 4) -> Bound:
    f, bytes_ = flops(m, seq_len), traffic(m, step_tokens, gradient)
    arithmetic = (f.executed - f.linear) / gpu.product
    return Bound(
        products=f.linear / gpu.product,
        attention=max(arithmetic, bytes_.attention / gpu.copy),
        memory=bytes_.streamed / gpu.copy,
    )


def bound_b(
    m: Model, seq_len: int, step_tokens: int, gpu: Gpu, micro_tokens: int | None = None,
    gradient: int = 4,
) -> Bound | None:  # fmt: skip
    """None where no rate of attention is published: other head dims, positions (2,048) or cards.

    micro_tokens: rows of the products, which their weight gradients contract (default: the step's).
    """
    if m.head_dim not in ATTENTION_RATES or seq_len != 2048 or gpu.name not in ATTENTION_CARDS:
        return None
    tokens = micro_tokens or step_tokens
    forward, backward = ATTENTION_RATES[m.head_dim]
    product = m.layers * m.hidden * seq_len
    return Bound(
        products=sum(
            2 * n * k * sum((1 + PIPELINE_FILL / inner) / gpu.product for inner in (k, n, tokens))
            for n, k in _products(m)
        ),
        attention=2 * product / forward + 5 * product / backward,
        memory=traffic(m, step_tokens, gradient).streamed / (STREAMING * gpu.copy),
        overhead=OVERHEAD,
    )


def _products(m: Model) -> list[tuple[int, int]]:
    """(outputs, inputs) of each product of a forward pass; [context | GELU] is one of 5h inputs."""
    h = m.hidden
    return [(3 * h, h), (4 * h, h), (h, 5 * h)] * m.layers + [(m.vocab_size, h)]


# --- memory and the command -----------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while training in 16 bits on the Triton kernels, without sharding.

    The most that is alive at once, as the step's tensors are counted on the meta device, to 2 % of
    what is not states. Not in it: cuBLAS's workspaces, the context, what the allocator rounds up or
    leaves between blocks, and beside a CUDA graph, whose memory is its own, the logits of
    validation.
    """

    states: float  # weights, moments, accumulated gradients
    gradients: float  # of a microbatch, in the compute dtype, until autograd's are accumulated
    activations: float
    logits: float
    working: float  # statistics, and what head or backward of a block hold beyond the logits

    @property
    def total(self) -> float:
        return self.states + self.gradients + self.activations + self.logits + self.working


def memory(
    m: Model, micro_tokens: int, gradient: int = 4, fused: bool = True, selective: bool = False,
    lean: bool = False,
) -> Memory:  # fmt: skip
    """gradient: bytes of what is accumulated a parameter. fused: embedding, blocks and head
    accumulate theirs themselves, autograd those of the last norm. selective: kernels.recompute.
    lean: optimizer.states.
    """
    by_autograd = 2 * m.hidden if fused else m.parameters
    return Memory(
        states=((LEAN_STATES if lean else STATES) + gradient) * m.parameters,
        gradients=2 * by_autograd,
        activations=activation_bytes(m, selective) * micro_tokens,
        logits=2 * m.vocab_size * micro_tokens,
        working=working_bytes(m, selective) * micro_tokens,
    )


def memory_of(config: Config, micro_tokens: int | None = None) -> Memory:
    """On one GPU, of the microbatch of the page or of another."""
    p, selective = config.precision, config.kernels.recompute == "selective"
    held = GRADIENT[p.gradients]
    if p.ranks > 1:
        held += GRADIENT[p.gradient_sum]  # and the sum over ranks
    lean = config.optimizer.states == "lean"
    adds = p.gradients == "fp32" or (lean and p.ranks == 1)
    tokens = config.train.micro_batch_size * config.data.seq_len
    return memory(
        config.model, tokens if micro_tokens is None else micro_tokens, held,
        adds and config.kernels.deterministic, selective, lean,
    )  # fmt: skip


def working_bytes(m: Model, selective: bool = False, tensor: int = 1) -> int:
    """Of a token, beyond activations and logits, at the moment that holds most.

    Statistics of attention and of both norms (4·H + 8 a layer), and the larger of: the head (its
    input, the stream before its norm, and their gradient: 3h beside the logits); the top block's
    backward in attention (dy and dx of a norm, h each; d [ctx | gelu] 5h, du 4h, d qkv 3h, dq in
    fp32 2h; both norms and [ctx | gelu] again, 7h, where selective). tensor: ranks that split them.
    """
    statistics = (4 * m.heads // tensor + 8) * m.layers
    split = 5 + 4 + 3 + 2 + 5 * selective
    backward = 2 * m.hidden * (2 + 2 * selective) + 2 * m.hidden * split // tensor
    logits = 2 * m.vocab_size // tensor
    return statistics + max(6 * m.hidden, backward - logits)


def activation_bytes(
    m: Model, selective: bool = False, tensor: int = 1, sequence: bool = False,
    layers: int | None = None,
) -> int:  # fmt: skip
    """Of a token, 16 bits: all kept, or (selective) norms and GELU formed again.

    tensor: ranks that split all but x and the norms of it. sequence: x is split too, and x̂ of all
    rows, from which both norms are formed again, kept in their place. layers: those kept.
    """
    kept = ACTIVATION_ELEMENTS - RECOMPUTED_ELEMENTS * selective
    norms = 0 if selective else 2
    whole = 1 if sequence else 1 + norms
    split = kept - (norms if sequence else whole)
    elements = whole * tensor + split  # of every rank together
    return 2 * elements * m.hidden * (m.layers if layers is None else layers) // tensor


def known(gpu: str) -> Gpu:
    """The card of a name. Raises InputError where its rates are not known here."""
    if gpu not in GPUS:
        raise InputError(f"--gpu {gpu}: its rates are not known here; {', '.join(GPUS)} are")
    return GPUS[gpu]


def must_be_16_bit(config: Config) -> None:
    """Raises InputError for what no plan is for."""
    if config.precision.compute == "fp32":
        raise InputError("precision.compute = 'fp32': plans are for bf16 and fp16")


def plan(config: Config, gpu: str) -> dict[str, Any]:
    """What `config` costs on one GPU; times are bounds. Raises InputError for what is not there."""
    card = known(gpu)
    must_be_16_bit(config)
    p = config.precision
    gradient = GRADIENT[p.gradients]
    m, t, seq_len = config.model, config.train, config.data.seq_len
    step, micro = config.tokens_per_step, t.micro_batch_size * seq_len
    found = memory_of(config)
    fitting = [
        rows
        for rows in range(1, t.batch_size + 1)
        if t.batch_size % (p.ranks * rows) == 0
        and memory_of(config, rows * seq_len).total <= card.memory
    ]
    per_token, a = flops(m, seq_len), bound_a(m, seq_len, step, card, gradient)
    b = bound_b(m, seq_len, step, card, micro, gradient)
    return {
        "gpus": 1,
        "gpu": card.name,
        "parameters": m.parameters,
        "tokens_per_step": step,
        "micro_batch_size": t.micro_batch_size,
        "fits": found.total <= card.memory,
        "largest_micro_batch_size": max(fitting, default=0),
        "memory_bytes": asdict(found) | {"total": found.total, "usable": card.memory},
        "flops_per_token": asdict(per_token),
        "flops": per_token.causal * step * t.steps,
        **{
            f"bound_{name}": None if bound is None else _at(bound, per_token, config, card)
            for name, bound in (("a", a), ("b", b))
        },
        "measured": False,
    }


def _at(bound: Bound, per_token: Flops, config: Config, gpu: Gpu) -> dict[str, float]:
    step = config.tokens_per_step * bound.seconds
    return {
        "tokens_per_s": bound.tokens_per_s,
        "ms_per_step": 1e3 * step,
        "hours": step * config.train.steps / 3600,
        "mfu_causal": mfu(per_token.causal, bound.tokens_per_s, gpu),
        "mfu_palm": mfu(per_token.palm, bound.tokens_per_s, gpu),
    }


def describe(row: dict[str, Any]) -> str:
    """`plan`'s row in words."""
    m = row["memory_bytes"]
    verdict = "fits" if row["fits"] else "does not fit"
    lines = [
        f"{row['parameters']:,} parameters on one {row['gpu']}, "
        f"{row['tokens_per_step']:,} tokens a step, {row['flops']:.3g} FLOPs in all",
        f"memory at {row['micro_batch_size']} rows a microbatch: {m['total'] / 1e9:.1f} of "
        f"{m['usable'] / 1e9:.0f} GB, {verdict}; largest that fits: "
        f"{row['largest_micro_batch_size'] or 'none'}",
    ]
    for name in ("a", "b"):
        at = row[f"bound_{name}"]
        if at is None:
            lines.append("bound B: no published rate of attention for this shape")
            continue
        lines.append(
            f"bound {name.upper()}: {at['tokens_per_s']:,.0f} tokens/s, "
            f"{at['ms_per_step']:,.1f} ms a step, {at['hours']:,.1f} hours, "
            f"MFU {at['mfu_causal']:.1%} causal, {at['mfu_palm']:.1%} PaLM"
        )
    said = "bounds, not measurements: A is at the product rate measured for the card"
    return "\n".join([*lines, said])
