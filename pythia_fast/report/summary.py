"""What `pythia-fast train` prints at the end, and the loss figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pythia_fast import checkpoint
from pythia_fast.config import Config
from pythia_fast.data.order import open_tokens
from pythia_fast.metrics import entropy
from pythia_fast.report.figures import loss_figure

_ENTROPY_TOKENS = 100_000_000  # more change the third decimal and take minutes


def summarise(config: Config, run: Path, last: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Draws the loss figure and continues log.sample; the result for scripts, and for people."""
    unigram = unigram_entropy(config)
    figure = loss_figure(run, unigram) if "tokens" in last else None  # else: no step was logged
    saved = checkpoint.steps(run)
    summary = {
        "run": str(run),
        **last,
        "unigram_entropy": unigram,
        "checkpoints": [str(checkpoint.directory(run, step)) for step in saved],
        "loss_figure": figure and str(figure),
    }
    lines = [f"trained to step {last['step']}"]
    if last.get("loss") is not None:
        lines[0] += f": loss {last['loss']:.4f} nats a token"
    if "valid_loss" in last:
        lines.append(
            f"held-out loss {last['valid_loss']:.4f} nats a token; unigram entropy of the corpus "
            f"{unigram:.4f}"
        )
    if config.log.sample:
        summary["sample"] = _sample(config, run, saved[-1])
        lines.append(f"sample: {summary['sample']}")
    lines += [
        f"checkpoints  {run / 'checkpoints'}: steps {', '.join(map(str, saved))}",
        f"loss figure  {figure or 'none: no step was taken'}",
        f"metrics      {run / 'metrics.jsonl'}",
        f"ledger       {run / 'ledger.jsonl'}",
    ]
    return summary, "\n".join(lines)


def unigram_entropy(config: Config) -> float:
    """Entropy of the training tokens' frequencies, nats; a longer file's first 10^8 tokens."""
    tokens = open_tokens(config.data.prefix)
    counts = np.zeros(config.model.vocab_size, dtype=np.int64)
    for start in range(0, min(len(tokens), _ENTROPY_TOKENS), 1 << 24):
        part = tokens.slice(start, min(start + (1 << 24), len(tokens), _ENTROPY_TOKENS))
        counts += np.bincount(part, minlength=len(counts))[: len(counts)]
    return entropy(counts)


def _sample(config: Config, run: Path, step: int) -> str:
    from pythia_fast.generate import continue_texts

    path, tokenizer = checkpoint.directory(run, step), Path(config.data.tokenizer)
    row = continue_texts(path, [config.log.sample], 40, tokenizer=tokenizer)[0]
    return repr(row["prompt"] + row["text"])
