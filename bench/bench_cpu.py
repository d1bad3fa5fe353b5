"""A training step on a CPU beside transformers, and the start-up time of the command line.

    python -m bench.bench_cpu [--json] [--repeats 7] [--threads 2]

Forward, backward and optimizer of pythia-14m and pythia-70m, fp32, one row of 512 tokens: ours
(reference ops, flat fused AdamW, clipping included) and transformers' GPTNeoXForCausalLM (sdpa)
with torch.optim.AdamW as a user would write it, with and without fused=True. All take turns in one
process on the same rows, so that a busy machine slows all of them; medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pythia_fast.config import Config, Precision, load
from pythia_fast.model import Pythia, initialise
from pythia_fast.ops import REFERENCE
from pythia_fast.optim import AdamW

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TOKENS = 512
CPU = torch.device("cpu")


def our_step(config: Config) -> Callable[[torch.Tensor], float]:
    model = Pythia(config.model)
    optimizer = AdamW(model, config.optimizer, Precision(compute="fp32"), REFERENCE, CPU)
    initialise(model, 0)

    def step(rows: torch.Tensor) -> float:
        loss = model.loss(rows)
        loss.backward()
        optimizer.accumulate()
        optimizer.step(1e-4)
        return loss.item()

    return step


def transformers_step(config: Config, fused: bool) -> Callable[[torch.Tensor], float]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    m = config.model
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            intermediate_size=4 * m.hidden,
            rotary_pct=m.rotary_pct,
            hidden_act="gelu_pytorch_tanh",
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )

    def step(rows: torch.Tensor) -> float:
        loss = model(rows[:, :-1], labels=rows[:, :-1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure_steps(size: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row an implementation: median ms a step, and its ratio to ours (> 1: ours is faster)."""
    config = load(CONFIGS / f"pythia-{size}.toml")
    steps = {
        "ours": our_step(config),
        "transformers, AdamW": transformers_step(config, fused=False),
        "transformers, AdamW(fused)": transformers_step(config, fused=True),
    }
    rows = torch.randint(0, 50277, (1, TOKENS + 1))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        order = list(steps) if turn % 2 else list(reversed(steps))
        for name in order:
            began = time.perf_counter()
            steps[name](rows)
            if turn >= 2:  # the first two warm caches and allocate states
                times[name].append(1e3 * (time.perf_counter() - began))
    ours = statistics.median(times["ours"])
    for name, samples in times.items():
        median = statistics.median(samples)
        yield {
            "bench": "cpu_step",
            "model": f"pythia-{size}",
            "impl": name,
            "tokens": TOKENS,
            "ms_p50": round(median, 1),
            "ms_min": round(min(samples), 1),
            "tokens_per_s": round(TOKENS / median * 1e3, 1),
            "ours_is_faster_by": round(median / ours, 3),
            **machine(),
        }


def measure_startup(repeats: int) -> dict[str, Any]:
    """Median seconds of `pythia-fast --help` in a fresh process."""
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pythia_fast", "--help"], check=True, capture_output=True
        )
        samples.append(time.perf_counter() - began)
    return {"bench": "startup", "seconds_p50": round(statistics.median(samples), 3), **machine()}


def machine() -> dict[str, Any]:
    load_average = os.getloadavg()[0]
    return {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(load_average, 1),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="JSON lines")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for size in ("14m", "70m"):
        for row in measure_steps(size, options.repeats):
            text = (
                "{model:12} {impl:28} {ms_p50:8.1f} ms  ours is faster by {ours_is_faster_by:.2f}"
            )
            print(json.dumps(row) if options.json else text.format(**row), flush=True)
    row = measure_startup(options.repeats)
    text = f"pythia-fast --help: {row['seconds_p50']:.2f} s"
    print(json.dumps(row) if options.json else text)


if __name__ == "__main__":
    main()
