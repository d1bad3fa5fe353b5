"""A training step of every size: ours beside what a user would pick instead.

    python -m bench.suite --only train

The same synthetic batch in every implementation (`bench/train_peers.py`), each in a process of its
own, in turns of opposite order. What is timed is the clean recipe (bf16, fp32 gradients, a constant
rate). Variants of ours say what they change: "any order" what gradients that differ from run to run
buy, "launch by launch" a step without its CUDA graph, "lean" optimizer states of 8 bytes a
parameter, "pythia-v1" the published recipe. Before anything is timed, the loss of a microbatch must
agree with the reference model's on the same weights; before a row is given, gradients and first
steps with those in fp32 (`bench/train_check.py`, last because its memory is), and the loss must
have fallen. One step is a whole optimizer step: every microbatch, clipping, update. Tokens a step
are one microbatch of the original on one GPU (6.9b and 12b accumulated two), the microbatch here
the largest that fits; what ran out of memory is in the row, and beside the peak what `plan` says.
The rate is all tokens over all the time, so that a stall counts; a sustained row does it for a
minute.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench import timing, train_check, train_peers
from bench.nvml import Reader, Sampler
from bench.processes import Case
from bench.record import Row, is_ours, times
from pythia_fast import plan
from pythia_fast.config import Config, resolve
from pythia_fast.recipe import switches

WARMUP = 3
FEWEST, MOST = 5, 50  # timed steps
SECONDS = 8.0  # of timed steps in one process
LIMIT = 300.0  # seconds of a process beside those of its timed steps
POSITIONS = 2048
ALL_SIZES = ("410m", "70m", "1.4b", "160m", "1b", "2.8b", "6.9b", "12b", "31m", "14m")  # by value
STEP_TOKENS = {"2.8b": 32768, "1.4b": 32768, "1b": 32768, "6.9b": 16384, "12b": 16384}
SMALL_STEP = 65536  # of the sizes that are not in the table
V1 = "ours pythia-v1"
V1_RANKS = 2  # half the rows each: as in the published runs, one sum over ranks a microbatch
GPU_IMPLS = (
    "ours", "ours any order", "ours launch by launch", "ours lean",
    "eager", "compile", "transformers-compile", V1,
)  # fmt: skip
LARGE = ("6.9b", "12b")  # recompute what they can; have lean states as a row of their own
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
LOSS_TOLERANCE = {"bf16": 5e-3, "fp16": 2e-3, "fp32": 1e-4}


def cases(
    sizes: Sequence[str],
    impls: Sequence[str],
    turn: int,
    on_gpu: bool,
    seconds: float = SECONDS,
    sustained: bool = False,
) -> Iterator[Case]:
    """All implementations of each size; odd turns go through them backwards.

    sustained: as many steps as the seconds hold.
    """
    for size in sizes:
        for impl in impls if turn % 2 == 0 else impls[::-1]:
            if impl == "ours lean" and size not in LARGE:
                continue
            positions = POSITIONS if on_gpu else CPU_POSITIONS if size != "tiny" else 32
            rows = STEP_TOKENS.get(size, SMALL_STEP) // positions if on_gpu else 1
            what = {
                "size": size, "impl": impl, "rows": rows, "positions": positions,
                "compute": _compute(size, impl, on_gpu), "seconds": seconds,
                "sustained": sustained,
            }  # fmt: skip
            head = {"bench": "train", **what, "turn": turn}
            kind = "train sustained" if sustained else "train"
            name = f"{kind} {size} {rows}x{positions} {what['compute']} {impl}"
            yield Case("bench.bench_train", name, head, what, LIMIT + (seconds if sustained else 0))


def _compute(size: str, impl: str, on_gpu: bool) -> str:
    """The published dtype of a size, or bf16 (fp32 on a CPU)."""
    if impl == V1:
        return str(switches("pythia-v1", f"pythia-{size}")["precision.compute"])
    return "bf16" if on_gpu else "fp32"


def best_peer(rows: Iterable[Row], size: str) -> str | None:
    """The implementation beside ours of the highest rate on a size; None where none has one."""
    rates = {
        row["impl"]: row["tokens_per_s"]
        for row in rows
        if row["bench"] == "train" and row["status"] == "ok" and row["size"] == size
        and not is_ours(row)
    }  # fmt: skip
    return max(rates, key=rates.__getitem__, default=None)


def measure(
    size: str,
    impl: str,
    rows: int,
    positions: int,
    compute: str,
    seconds: float = SECONDS,
    sustained: bool = False,
    clock: timing.StepClock | None = None,
    read: Reader | None = None,
) -> Iterator[Row]:
    """One row. clock, read: what stands in for time and NVML in a test."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = clock or timing.step_clock(device)
    variant = dict(train_peers.VARIANTS.get(impl, {}))
    recipe = variant.pop("recipe", "")
    config = configuration(size, rows, positions, compute, recipe, variant)
    tokens = synthetic_batch(config, device)
    exhausted: list[int] = []
    try:
        config, warm = fitting(impl, config, tokens, exhausted)
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
    most = None if sustained else MOST
    milliseconds, state, last = _timed_steps(warm.stepper, tokens, clock, seconds, most, read)
    row = _figures(config, milliseconds, state, device)
    first = warm.steps.losses[0]
    row |= {"exhausted_at_rows": exhausted, "loss_first": first, "loss_last": last}
    row |= {"attention": warm.attention, "recipe": recipe or "clean"}
    if impl.startswith("ours") and device.type == "cuda":
        row["predicted_peak_gb"] = plan.memory_of(config).total / 1e9
    row |= {"sum_ranks": config.precision.ranks}
    checked = _checked(warm.steps, config, tokens, warm.drop)
    if not last < first:
        checked = {"status": "wrong", "reason": f"loss {first} did not fall: {last}"}
    if checked.get("status") == "wrong":
        yield checked
    else:
        yield row | checked


class _TooLarge(Exception):
    """Not even one row a microbatch fits."""


class _Wrong(Exception):
    """The loss is not the reference's."""


def configuration(
    size: str, rows: int, positions: int, compute: str, recipe: str = "",
    variant: Mapping[str, Any] = MappingProxyType({}),
) -> Config:  # fmt: skip
    """The model and learning rate of a size; a constant rate, so that every step moves.

    recipe "": `compute` with fp32 gradients on one rank and Adam's count from 1, which the peers
    do too. "pythia-v1": the published switches of the size (its dtypes, sums over V1_RANKS ranks,
    loss scale). variant: keys over these.
    """
    model: dict[str, Any] = TINY if size == "tiny" else {"model.preset": f"pythia-{size}"}
    keys = {
        **model,
        "data.seq_len": positions,
        "train.steps": 100,
        "train.batch_size": rows,
        "train.micro_batch_size": rows,
        "optimizer.warmup": 0.0,
        "kernels.recompute": "selective" if size in LARGE else "none",
        **variant,
    }
    if recipe:
        keys |= {"recipe": recipe, "precision.sum_ranks": V1_RANKS}
        keys |= {"train.micro_batch_size": rows // V1_RANKS}
    else:
        keys |= {"precision.compute": compute, "optimizer.step_offset": 0}
    return resolve(keys | {"optimizer.min_lr": resolve(keys).optimizer.lr})


def synthetic_batch(config: Config, device: torch.device) -> Tensor:
    """(rows, T + 1) int64 of uniformly drawn ids, the same everywhere."""
    size = (config.train.batch_size, config.data.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.model.vocab_size, size, generator=generator).to(device)


@dataclass
class Warm:
    """A stepper after its warm-up; what its first steps were; the attention that it runs."""

    stepper: train_peers.Stepper
    steps: train_check.FirstSteps
    attention: str

    def drop(self) -> None:
        """Gives its memory back."""
        del self.stepper
        _empty()


def fitting(impl: str, config: Config, tokens: Tensor, exhausted: list[int]) -> tuple[Config, Warm]:
    """A warm stepper with the largest microbatch that fits, its loss checked.

    exhausted: takes the microbatches that ran out of memory.
    """
    micro = whole = config.train.micro_batch_size
    while True:
        smaller = replace(config, train=replace(config.train, micro_batch_size=micro))
        try:
            return smaller, _warm(impl, smaller, tokens)
        except torch.OutOfMemoryError as error:
            exhausted.append(micro)
            reason = str(error).splitlines()[0]
        _empty()  # outside of the handler: its traceback holds the tensors
        if micro == 1:
            raise _TooLarge(f"{config.model.parameters:,} parameters: {reason}")
        micro = max(m for m in range(1, micro) if whole % m == 0)


def _empty() -> None:
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def _warm(impl: str, config: Config, tokens: Tensor) -> Warm:
    stepper = train_peers.make(impl, config, tokens.device)
    compute = config.precision.compute
    micro = tokens[: config.train.micro_batch_size]
    found = stepper.loss(micro).item()
    exact = sum(train_peers.reference_loss(config, stepper.model, r) for r in micro.split(1))
    exact /= len(micro)
    if not abs(found - exact) <= LOSS_TOLERANCE[compute]:
        raise _Wrong(f"loss {found:.5f} where the reference model has {exact:.5f}")
    gradients = train_check.gradients(stepper, micro)
    backends = train_peers.attention_backends(lambda: stepper.loss(micro))
    if tokens.device.type == "cuda":  # from here on: a graph allocates while it is captured alone
        torch.cuda.reset_peak_memory_stats()
    steps = train_check.first_steps(stepper, config, tokens, WARMUP)
    return Warm(stepper, replace(steps, gradients=gradients), ", ".join(backends) or "ours")


def _checked(
    found: train_check.FirstSteps, config: Config, tokens: Tensor, drop: Callable[[], None]
) -> Row:
    """Columns of `train_check.compare`; where the reference does not fit, that it was not made."""
    drop()
    try:
        exact = train_check.reference(config, tokens)
    except torch.OutOfMemoryError as error:
        return {"unchecked": f"gradients: {str(error).splitlines()[0]}"}
    return train_check.compare(found, exact, config)


def _timed_steps(
    stepper: train_peers.Stepper,
    tokens: Tensor,
    clock: timing.StepClock,
    seconds: float,
    most: int | None,
    read: Reader | None,
) -> tuple[list[float], Row, float]:
    """Milliseconds a step, the device's state and the last loss.

    The number of steps, at most `most`, follows from one of them.
    """
    clock.mark()
    stepper.step(tokens)
    clock.mark()
    (one,) = clock.intervals()
    count = max(int(1e3 * seconds / one), FEWEST)
    with Sampler(read) as sampler:
        clock.mark()
        for _ in range(count if most is None else min(count, most)):
            loss, _ = stepper.step(tokens)
            clock.mark()
        milliseconds = clock.intervals()
    return milliseconds, sampler.summary(), loss.item()


def tokens_per_second(tokens: int, milliseconds: Sequence[float]) -> float:
    """Of all timed steps together: a stall counts, which a median hides."""
    return 1e3 * tokens * len(milliseconds) / sum(milliseconds)


def _figures(config: Config, milliseconds: list[float], state: Row, device: torch.device) -> Row:
    row = times(milliseconds)
    tokens = config.tokens_per_step
    rate = tokens_per_second(tokens, milliseconds)
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
            "tflops": per_token.causal * rate / 1e12,
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
