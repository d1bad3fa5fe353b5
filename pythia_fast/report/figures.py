"""Figures of a run, as PNG files in its directory."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pythia_fast.metrics import read_steps

OURS, HELD_OUT, GUIDE = "#1f5fa8", "#d1495b", "#6b6b6b"


def loss_figure(run: Path, unigram_entropy: float | None = None) -> Path:
    """Training and held-out loss (nats a token) over tokens, log-spaced; returns `<run>/loss.png`.

    unigram_entropy: drawn as the line that a model without context cannot pass, nats a token.
    """
    logged = read_steps(run / "metrics.jsonl")
    rows = [row for row in logged if row["loss"] is not None]  # None: a skipped step in fp16
    tokens = np.array([row["tokens"] for row in rows], dtype=float)
    loss = np.array([row["loss"] for row in rows])
    held = [(row["tokens"], row["valid_loss"]) for row in rows if "valid_loss" in row]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes.plot(
        tokens, loss, color=OURS, linewidth=0.8, alpha=0.35, label="training, each logged step"
    )
    axes.plot(*_log_means(tokens, loss), color=OURS, linewidth=1.6, label="mean of 1/20 decade")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color=HELD_OUT, markersize=4, label="held out")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=GUIDE, linestyle="--", linewidth=1)
        axes.annotate(
            f"unigram entropy {unigram_entropy:.2f}",
            (tokens[0] if len(tokens) else 1, unigram_entropy),
            (4, 4),
            textcoords="offset points",
            color=GUIDE,
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(run.name, loc="left", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = run / "loss.png"
    temporary = run / "loss.tmp.png"
    figure.savefig(temporary)
    plt.close(figure)
    temporary.replace(path)
    return path


def _log_means(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean tokens and mean loss of each twentieth of a decade of tokens."""
    place = np.floor(20 * np.log10(np.maximum(tokens, 1))).astype(int)
    _, group, count = np.unique(place, return_inverse=True, return_counts=True)
    return np.bincount(group, tokens) / count, np.bincount(group, loss) / count
