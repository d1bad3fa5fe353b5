"""The parts of a model that the ranks of a pipeline hold: parameters, seconds, saved bytes.

Seconds are those of `plan`'s bound A with the products of bound B: rates of large products times
K/(K + 96) for a contraction of length K, which a tensor degree p shortens; attention at the rate of
a product; elementwise work at that of a copy. A backward is two halves: that of the inputs, which
the stage before waits for, and that of the weights, which nothing waits for.

Letters: h hidden, V vocabulary, T positions, p tensor degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pythia_fast import plan
from pythia_fast.config import Model


@dataclass(frozen=True)
class Seconds:
    """Of one microbatch: forward, backward of the inputs, backward of the weights."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    @property
    def backward(self) -> float:
        return self.inputs + self.weights

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights
        )

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.forward * times, self.inputs * times, self.weights * times)


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers, with the embedding before or the last norm and head after them."""

    layers: int
    embedding: bool = False
    head: bool = False


# --- seconds --------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def layer_seconds(
    m: Model, gpu: plan.Gpu, seq_len: int, tokens: int, tensor: int = 1, sequence: bool = False
) -> Seconds:
    """Of one layer on one of `tensor` ranks, without its collectives. tokens: of a microbatch."""
    h, p = m.hidden, tensor
    norm, residual, gelu, gelu_backward, norm_backward = plan.LAYER_ELEMENTS.values()
    split = p if sequence else 1
    width = 2 * h * tokens / gpu.copy  # seconds of h elements a token
    attention = h * seq_len * tokens / p / gpu.product  # of one of its products
    read, read_again = 4, plan.ATTENTION_ELEMENTS - 4  # q k v o; and with them their gradients
    products = _products([(3 * h // p, h), (4 * h // p, h), (h, 5 * h // p)], tokens, gpu)
    return products + Seconds(
        forward=max(2 * attention, read * width / p)
        + width * ((norm + residual) / split + gelu / p),
        inputs=max(5 * attention, read_again * width / p)
        + width * (norm_backward / split + gelu_backward / p),
    )


@lru_cache(maxsize=512)
def end_seconds(m: Model, gpu: plan.Gpu, tokens: int, tensor: int = 1) -> tuple[Seconds, Seconds]:
    """Of the embedding, and of the last norm, head and cross-entropy."""
    width, rows = 2 * m.hidden * tokens / gpu.copy, m.vocab_size // tensor
    norm_and_loss = Seconds(forward=2 * width + 4 * rows * tokens / gpu.copy, inputs=3 * width)
    head = _products([(rows, m.hidden)], tokens, gpu)
    return Seconds(forward=2 * width, inputs=5 * width), head + norm_and_loss


def _products(shapes: list[tuple[int, int]], tokens: int, gpu: plan.Gpu) -> Seconds:
    """shapes: (outputs, inputs); each of three products contracts one of the three lengths."""
    fill = plan.PIPELINE_FILL
    return Seconds(
        *(
            sum(2 * n * k * tokens * (1 + fill / (k, n, tokens)[which]) for n, k in shapes)
            / gpu.product
            for which in range(3)
        )
    )


# --- cutting --------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def cut(layers: int, stages: int, layer: float, embedding: float, head: float) -> tuple[Chunk, ...]:
    """`stages` chunks whose slowest is as fast as can be, the others as even as that allows.

    layer, embedding, head: what each costs, in one unit. Each chunk has a layer at least. Layers
    left over go behind the first stage, which keeps most microbatches in flight.
    """
    if stages == 1:
        return (Chunk(layers, embedding=True, head=True),)
    inner = stages - 2

    def costs(first: int, last: int) -> tuple[float, float]:
        """Of the slowest chunk; sum of squares."""
        ends = (embedding + first * layer, last * layer + head)
        few, more = divmod(layers - first - last, inner) if inner else (0, 0)
        slowest = max(*ends, (few + bool(more)) * layer)
        squares = more * (few + 1) ** 2 + (inner - more) * few**2
        return slowest, sum(end**2 for end in ends) + squares * layer**2

    first, last = min(
        (
            (first, last)
            for first in range(1, layers - inner)
            for last in range(1, layers - inner - first + 1)
            if inner or first + last == layers
        ),
        key=lambda ends: costs(*ends),
    )
    few, more = divmod(layers - first - last, inner) if inner else (0, 0)
    middle = [few + (i >= inner - more) for i in range(inner)]
    return (
        Chunk(first, embedding=True),
        *(Chunk(n) for n in middle),
        Chunk(last, head=True),
    )


# --- what a rank holds ----------------------------------------------------------------------------


def parameters(m: Model, chunk: Chunk, tensor: int = 1) -> int:
    """Of a chunk on one tensor rank: matrices split, norms and row-parallel biases on each."""
    h, p = m.hidden, tensor
    layer = (12 * h * h + 7 * h) // p + 6 * h
    return (
        chunk.layers * layer
        + (chunk.embedding + chunk.head) * m.vocab_size * h // p
        + chunk.head * 2 * h
    )


def replicated(m: Model, chunk: Chunk, biases: bool = False) -> int:
    """Parameters of a chunk whose gradients tensor ranks add up: norms; biases: the row biases."""
    return ((6 if biases else 4) * chunk.layers + 2 * chunk.head) * m.hidden


def chunk_seconds(chunk: Chunk, layer: Seconds, ends: tuple[Seconds, Seconds]) -> Seconds:
    found = layer * chunk.layers
    if chunk.embedding:
        found += ends[0]
    return found + ends[1] if chunk.head else found


# --- schedules, in closed form --------------------------------------------------------------------


def in_flight(
    schedule: str, rank: int, ranks: int, microbatches: int, chunks: int = 1
) -> int:  # fmt: skip
    """Chunks of one microbatch whose activations a rank holds at most, until their last use.

    With zero bubbles that is the weights' half of the backward. `simulation.peak` counts the same
    in the lists of operations.
    """
    if ranks == 1:
        return 1
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(ranks - rank, microbatches)
    if schedule == "zero-bubble":
        return min(ranks, microbatches)
    warmup = (chunks - 1) * round_of(ranks, microbatches) + 2 * (ranks - 1 - rank)
    return min(warmup + 1, chunks * microbatches)


def round_of(ranks: int, microbatches: int) -> int:
    """Microbatches that an interleaved schedule takes through one chunk before the next."""
    return microbatches // max(1, microbatches // ranks)


def sends_waited_for(schedule: str, ranks: int, chunks: int = 1) -> int:
    """Sends that a step takes longer for at equal stages, ranks dividing microbatches.

    1f1b: beside 2(P - 1)/P of each microbatch after the first P. zero-bubble: at most, and all of
    them from 2P microbatches on. `simulation` finds the same.
    """
    return {
        "gpipe": 2 * (ranks - 1),
        "1f1b": 2 * (ranks - 1) + 2 * (ranks - 2),
        "interleaved-1f1b": 2 * (chunks * ranks - 1),
        "zero-bubble": 4 * (ranks - 1),
    }[schedule]
