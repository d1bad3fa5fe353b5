"""A training step of every size: ours beside what a user would pick instead.

    python -m bench.suite --only train

The same synthetic batch and recipe in every implementation (`bench/train_peers.py`), each in a
process of its own, in turns of opposite order. Before anything is timed, the loss of a microbatch
must agree with the reference model's on the same weights; afterwards it must have fallen. One step
is a whole optimizer step: every microbatch, clipping, update. Tokens a step are one microbatch
of the original on one GPU (6.9b and 12b accumulated two); the microbatch here is the largest that
fits; what ran out of memory is in the row.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import timing, train_peers
from bench.nvml import Reader, Sampler
from bench.processes import Case
from bench.record import Row, times
from pythia_fast import plan
from pythia_fast.config import Config, resolve

WARMUP = 3
FEWEST, MOST = 5, 50  # timed steps
SECONDS = 8.0  # of timed steps in one process
POSITIONS = 2048
ALL_SIZES = ("410m", "70m", "1.4b", "160m", "1b", "2.8b", "6.9b", "12b", "31m", "14m")  # by value
STEP_TOKENS = {"2.8b": 32768, "1.4b": 32768, "1b": 32768, "6.9b": 16384, "12b": 16384}
SMALL_STEP = 65536  # of the sizes that are not in the table
GPU_IMPLS = ("ours", "eager", "compile", "transformers-compile")
CPU_IMPLS = ("ours", "compile", "transformers")  # eager is ours there
CPU_POSITIONS = 512
TINY = {
    "model.layers": 2,
    "model.hidden": 64,
    "model.heads": 4,
    "model.vocab_size": 500,
    "optimizer.lr": 1e-3,
}
# nats a token, between two roundings of one mean over a row
LOSS_TOLERANCE = {"bf16": 5e-3, "fp32": 1e-4}


def cases(
    sizes: Sequence[str], impls: Sequence[str], turn: int, on_gpu: bool, seconds: float = SECONDS
) -> Iterator[Case]:
    """All implementations of each size; odd turns go through them backwards."""
    for size in sizes:
        for impl in impls if turn % 2 == 0 else impls[::-1]:
            positions = POSITIONS if on_gpu else CPU_POSITIONS if size != "tiny" else 32
            rows = STEP_TOKENS.get(size, SMALL_STEP) // positions if on_gpu else 1
            what = {
                "size": size, "impl": impl, "rows": rows, "positions": positions,
                "compute": "bf16" if on_gpu else "fp32", "seconds": seconds,
            }  # fmt: skip
            head = {"bench": "train", **what, "turn": turn}
            name = f"train {size} {rows}x{positions} {what['compute']} {impl}"
            yield Case("bench.bench_train", name, head, what, 240.0)


def measure(
    size: str,
    impl: str,
    rows: int,
    positions: int,
    compute: str,
    seconds: float = SECONDS,
    clock: timing.StepClock | None = None,
    read: Reader | None = None,
) -> Iterator[Row]:
    """One row. clock, read: what stands in for time and NVML in a test."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = clock or timing.step_clock(device)
    config = configuration(size, rows, positions, compute)
    tokens = synthetic_batch(config, device)
    exhausted: list[int] = []
    try:
        config, stepper, losses = fitting(impl, config, tokens, exhausted)
    except ImportError as error:
        yield {"status": "skipped", "reason": f"{type(error).__name__}: {error}"}
        return
    except _TooLarge as error:
        yield {
            "status": "out of memory", "reason": str(error), "exhausted_at_rows": exhausted,
            "parameters": config.model.parameters,
        }  # fmt: skip
        return
    except _Wrong as error:
        yield {"status": "wrong", "reason": str(error)}
        return
    milliseconds, state = _timed_steps(stepper, tokens, clock, seconds, losses, read)
    first, last = losses[0].item(), losses[-1].item()
    row = _figures(config, milliseconds, state, device)
    row |= {"exhausted_at_rows": exhausted, "loss_first": first, "loss_last": last}
    if not last < first:
        yield row | {"status": "wrong", "reason": f"loss {first} did not fall: {last}"}
    else:
        yield row


class _TooLarge(Exception):
    """Not even one row a microbatch fits."""


class _Wrong(Exception):
    """The loss is not the reference's."""


def configuration(size: str, rows: int, positions: int, compute: str) -> Config:
    """The published recipe of a size, shortened so that its warm-up is one step."""
    model: dict[str, Any] = TINY if size == "tiny" else {"model.preset": f"pythia-{size}"}
    return resolve(
        {
            **model,
            "data.seq_len": positions,
            "train.steps": 100,
            "train.batch_size": rows,
            "train.micro_batch_size": rows,
            "precision.compute": compute,
        }
    )


def synthetic_batch(config: Config, device: torch.device) -> Tensor:
    """(rows, T + 1) int64 of uniformly drawn ids, the same everywhere."""
    size = (config.train.batch_size, config.data.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.model.vocab_size, size, generator=generator).to(device)


def fitting(
    impl: str, config: Config, tokens: Tensor, exhausted: list[int]
) -> tuple[Config, train_peers.Stepper, list[Tensor]]:
    """A checked and warm stepper with the largest microbatch that fits, and its first losses.

    exhausted: takes the microbatches that ran out of memory.
    """
    micro = config.train.batch_size
    while True:
        smaller = replace(config, train=replace(config.train, micro_batch_size=micro))
        try:
            return smaller, *_warm(impl, smaller, tokens)
        except torch.OutOfMemoryError as error:
            exhausted.append(micro)
            reason = str(error).splitlines()[0]
        # outside of the handler: its traceback holds the tensors
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        if micro == 1:
            raise _TooLarge(f"{config.model.parameters:,} parameters: {reason}")
        micro = max(m for m in range(1, micro) if config.train.batch_size % m == 0)


def _warm(impl: str, config: Config, tokens: Tensor) -> tuple[train_peers.Stepper, list[Tensor]]:
    stepper = train_peers.make(impl, config, tokens.device)
    compute = config.precision.compute
    micro = tokens[: config.train.micro_batch_size]
    found = stepper.loss(micro).item()
    exact = sum(train_peers.reference_loss(config, stepper.model, r) for r in micro.split(1))
    exact /= len(micro)
    if not abs(found - exact) <= LOSS_TOLERANCE[compute]:
        raise _Wrong(f"loss {found:.5f} where the reference model has {exact:.5f}")
    return stepper, [stepper.step(tokens) for _ in range(WARMUP)]


def _timed_steps(
    stepper: train_peers.Stepper,
    tokens: Tensor,
    clock: timing.StepClock,
    seconds: float,
    losses: list[Tensor],
    read: Reader | None,
) -> tuple[list[float], Row]:
    """Milliseconds a step and the device's state; the number of steps follows from one of them."""
    clock.mark()
    losses.append(stepper.step(tokens))
    clock.mark()
    (one,) = clock.intervals()
    count = min(max(int(1e3 * seconds / one), FEWEST), MOST)
    if tokens.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Sampler(read) as sampler:
        clock.mark()
        for _ in range(count):
            losses.append(stepper.step(tokens))
            clock.mark()
        milliseconds = clock.intervals()
    return milliseconds, sampler.summary()


def _figures(config: Config, milliseconds: list[float], state: Row, device: torch.device) -> Row:
    row = times(milliseconds)
    tokens = config.tokens_per_step
    rate = 1e3 * tokens / row["ms_p50"]
    per_token = plan.flops(config.model, config.data.seq_len)
    energy = state.get("energy_j")
    row |= {
        "tokens": tokens,
        "tokens_per_s": rate,
        "micro_batch_size": config.train.micro_batch_size,
        "parameters": config.model.parameters,
        "data": "synthetic, one batch",
        "joule_per_token": None if energy is None else energy / (tokens * len(milliseconds)),
        **{k: v for k, v in state.items() if k != "energy_j"},
    }
    if device.type == "cuda":
        card = plan.card(torch.cuda.get_device_name(device))
        row |= {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "mfu_causal": card and plan.mfu(per_token.causal, rate, card),
            "mfu_palm": card and plan.mfu(per_token.palm, rate, card),
        }
    else:
        row |= {"peak_gb": peak_resident_gb(), "mfu_causal": None, "mfu_palm": None}
        row |= {"threads": torch.get_num_threads()}
    return row


def peak_resident_gb() -> float:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
