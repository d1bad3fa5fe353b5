"""The published runs in numbers: the suite's sizes, and two recipes as sets of named switches.

`SUITE` is what a size fixes in any recipe. `SWITCHES` is what a recipe fixes: "pythia-v1" computes
what GPT-NeoX v1.0 computed for that size, "modern" is the clean set. Plain tables of dotted keys;
`config.resolve` lays them under a page, `pythia-fast train --explain` prints them.

Sources: gpt-neox = EleutherAI/gpt-neox v1.0; DeeperSpeed = EleutherAI/DeeperSpeed eb7f5cff, which
it pins; YAML = models/ of EleutherAI/pythia.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RECIPES = ("pythia-v1", "modern")


@dataclass(frozen=True)
class Switch:
    """One named difference: its value in "pythia-v1" before the sizes' own, and in "modern"."""

    key: str
    pythia_v1: Any
    modern: Any
    reason: str
    source: str


SWITCHES = (
    Switch(
        "model.activation", "gelu_tanh", "gelu",
        "the fused bias and GELU has the tanh form; Hugging Face evaluates the erf form",
        "gpt-neox activations.py:36-93",
    ),
    Switch(
        "model.rope_table", "fp16", "fp32",
        "inv_freq was cast with the module, so the angles are rounded to the compute dtype",
        "DeeperSpeed engine.py:622; gpt-neox positional_embeddings.py:48-63",
    ),
    Switch(
        "model.init", "small-wang", "small-wang",
        "6.9b and 12b left the init keys out and got normal 0.02, 0.02/sqrt(2L)",
        "gpt-neox neox_args.py:260, init_functions.py:20-36",
    ),
    Switch(
        "model.vocab_size", 50304, 50304,
        "50,277 ids padded to a multiple of 128 x tensor degree; padding stays in the softmax",
        "gpt-neox tokenizer.py:69-83",
    ),
    Switch(
        "optimizer.schedule", "neox-v1", "cosine",
        "the cosine aims at 0, its first update is at 0, and it is cut off flat at min_lr",
        "gpt-neox learning_rates.py:61-93",
    ),
    Switch(
        "optimizer.schedule_counts", "updates", "steps",
        "a step skipped for overflow uses up its data but does not move the schedule",
        "DeeperSpeed engine.py:1188-1198",
    ),
    Switch(
        "optimizer.step_offset", 1, 0,
        "the optimizer took an empty step when it was built, so Adam's t starts at 2",
        "DeeperSpeed stage1.py:313-325",
    ),
    Switch(
        "optimizer.decay_embeddings", True, True,
        "only LayerNorms and biases are left out of weight decay: both embeddings decay",
        "gpt-neox model/utils.py:26-65",
    ),
    Switch(
        "optimizer.clip_eps", 1e-6, 1e-6,
        "gradients are scaled by min(1, clip/(norm + 1e-6))",
        "DeeperSpeed stage1.py:785-805",
    ),
    Switch(
        "optimizer.row_bias_copies", 1, 1,
        "each tensor-parallel rank added its own bias before the sum: p copies, p x lr",
        "gpt-neox transformer.py:684-702; its converter sums them",
    ),
    Switch(
        "optimizer.norm_copies", 1, 1,
        "LayerNorms and row biases are counted once a tensor-parallel rank in the norm",
        "DeeperSpeed module.py:256-259, utils.py:224-241",
    ),
    Switch(
        "precision.compute", "fp16", "bf16",
        "fp16 everywhere but in pythia-1b, which spiked in fp16 and ran in bf16",
        "YAML; README of EleutherAI/pythia; its issue 171",
    ),
    Switch(
        "precision.gradients", "fp16", "fp32",
        "microbatches add up in the weights' dtype, in autograd's .grad",
        "DeeperSpeed stage1.py:807",
    ),
    Switch(
        "precision.gradient_sum", "fp16", "fp32",
        "data-parallel ranks are summed in this dtype (1b: fp32, by a YAML written later)",
        "DeeperSpeed engine.py:1323-1347; gpt-neox configs/pythia/1B.yml",
    ),
    Switch(
        "precision.sum_ranks", 1, 1,
        "the ranks' gradients are summed first and divided by their number after",
        "DeeperSpeed pipe/engine.py:234-246",
    ),
    Switch(
        "precision.loss_scaling", "hysteresis", "none",
        "2^12, doubled after 1,000 clean steps; the first overflow since is free, others halve",
        "DeeperSpeed loss_scaler.py:102-168; without ZeRO: fused_optimizer.py:363-393",
    ),
    Switch(
        "precision.unscale_after_update", True, False,
        "the step that doubles the scale divides by the doubled one: half a gradient",
        "DeeperSpeed stage1.py:690-693, 792-797",
    ),
)  # fmt: skip


# --- the suite ------------------------------------------------------------------------------------


def _size(
    layers: int, hidden: int, heads: int, lr: float, rows: int,
    vocab: int = 50304, init: str = "small-wang",
) -> dict[str, Any]:  # fmt: skip
    """What the published run of one size fixes in any recipe. rows: its microbatch."""
    return {
        "model.layers": layers,
        "model.hidden": hidden,
        "model.heads": heads,
        "model.vocab_size": vocab,
        "model.init": init,
        "train.micro_batch_size": rows,
        "optimizer.lr": lr,
        "optimizer.min_lr": round(lr / 10, 12),  # 6e-5, not 5.9999999999999995e-05
    }


SUITE: dict[str, dict[str, Any]] = {
    "pythia-14m": _size(6, 128, 4, 1e-3, 32),
    "pythia-31m": _size(6, 256, 8, 1e-3, 32),
    "pythia-70m": _size(6, 512, 8, 1e-3, 32),
    "pythia-160m": _size(12, 768, 12, 6e-4, 32),
    "pythia-410m": _size(24, 1024, 16, 3e-4, 32),
    "pythia-1b": _size(16, 2048, 8, 2.5e-4, 16),
    "pythia-1.4b": _size(24, 2048, 16, 2e-4, 16),
    "pythia-2.8b": _size(32, 2560, 32, 1.6e-4, 16),
    "pythia-6.9b": _size(32, 4096, 32, 1.2e-4, 8, vocab=50432, init="normal"),
    "pythia-12b": _size(36, 5120, 40, 1.2e-4, 8, vocab=50688, init="normal"),
}

_NOT_DEDUPED = ("pythia-14m", "pythia-31m")
PRESETS = SUITE | {
    f"{name}-deduped": size for name, size in SUITE.items() if name not in _NOT_DEDUPED
}
"""Every published model, also those on deduplicated data: the values of its size."""


def _layout(ranks: int, tensor: int = 1) -> dict[str, Any]:
    """What the degrees of the published run (YAML, paper's appendix) do to the arithmetic."""
    return {
        "precision.sum_ranks": ranks,
        "optimizer.row_bias_copies": tensor,
        "optimizer.norm_copies": tensor,
    }


# 1b is of two sources: bf16 and fp32_allreduce stand in the YAML that gpt-neox got later, with
# microbatches of 4 accumulated 4 times; 16 rows at once in the suite's, which still says fp16
_NO_ZERO = {"precision.loss_scaling": "dynamic"}  # 14m, 31m: the optimizer without hysteresis
_BF16 = {
    "precision.compute": "bf16",
    "precision.gradients": "bf16",
    "precision.gradient_sum": "fp32",
    "precision.loss_scaling": "none",
    "model.rope_table": "bf16",
}
_OWN: dict[str, dict[str, Any]] = {
    "pythia-14m": _layout(32) | _NO_ZERO,
    "pythia-31m": _layout(32) | _NO_ZERO,
    "pythia-70m": _layout(32),
    "pythia-160m": _layout(32),
    "pythia-410m": _layout(32),
    "pythia-1b": _layout(64) | _BF16,
    "pythia-1b-deduped": _layout(64),
    "pythia-1.4b": _layout(64),
    "pythia-2.8b": _layout(64),
    "pythia-6.9b": _layout(64, tensor=2),
    "pythia-12b": _layout(64, tensor=4),
}


_LR_1B = "2.5e-4 in the YAMLs of both repositories, 3e-4 in paper and README: unresolved"
_LATE = "the size ran in October and November 2023, after gpt-neox had changed it"
_UNVERIFIED: dict[str, dict[str, str]] = {
    "pythia-14m": {
        "model.rope_table": f"{_LATE} (2023-09-25, to fp32)",
        "optimizer.schedule": f"{_LATE} (2023-08, the cosine aims at min_lr)",
    },
    "pythia-1b": {
        "train.micro_batch_size": "16 rows at once in the suite's YAML, 4 four times in gpt-neox's",
        "optimizer.lr": _LR_1B,
        "optimizer.min_lr": "a tenth of the rate, which is unresolved",
        "precision.gradient_sum": "fp32_allreduce stands in gpt-neox's later YAML alone",
        "precision.loss_scaling": "in that YAML too: none, a constant scale of 1",
    },
    "pythia-1b-deduped": {
        "optimizer.lr": _LR_1B,
        "optimizer.min_lr": "a tenth of the rate, which is unresolved",
    },
}
_UNVERIFIED["pythia-31m"] = _UNVERIFIED["pythia-14m"]


def unverified(preset: str) -> dict[str, str]:
    """Dotted key -> why it is not known that the published run had the recipe's value of it."""
    return _UNVERIFIED.get(preset, {})


def switches(recipe: str, preset: str = "") -> dict[str, Any]:
    """Dotted key -> value of every switch in `recipe` ("" gives none) for a published model.

    Without a preset the vocabulary is the page's own: padding belongs to the suite's tokenizer.
    """
    if recipe not in RECIPES:
        return {}
    name = "pythia_v1" if recipe == "pythia-v1" else recipe
    values = {s.key: getattr(s, name) for s in SWITCHES}
    if not preset:
        del values["model.vocab_size"]
    elif recipe == "pythia-v1":
        own = _OWN.get(preset, _OWN.get(preset.removesuffix("-deduped"), {}))
        values |= {k: v for k, v in PRESETS[preset].items() if k in values} | own
    return values
