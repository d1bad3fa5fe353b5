"""What a configuration must satisfy beyond the types of its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pythia_fast.errors import InputError

if TYPE_CHECKING:
    from pythia_fast.config import Config


def validate(config: Config) -> None:
    """Raises InputError naming the key, or the two numbers that do not fit."""
    m, d, t, o, c = config.model, config.data, config.train, config.optimizer, config.checkpoint
    for name in ("model.layers", "model.hidden", "model.heads", "model.vocab_size", "data.seq_len"):
        _positive(config, name)
    for name in ("train.steps", "train.batch_size", "train.micro_batch_size"):
        _positive(config, name)
    for name in ("train.valid_every", "train.valid_rows", "log.every", "optimizer.clip"):
        _positive(config, name)
    for name in ("optimizer.row_bias_copies", "optimizer.norm_copies", "precision.sum_ranks"):
        _positive(config, name)
    for name in ("checkpoint.keep", "model.rotary_base", "model.norm_eps", "optimizer.lr"):
        _positive(config, name)
    _positive(config, "parallel.timeout")
    if m.hidden % m.heads:
        raise InputError(f"model.heads = {m.heads} does not divide model.hidden = {m.hidden}")
    if not 0 < m.rotary_pct <= 1 or m.rotary_dim % 2 or m.rotary_dim == 0:
        raise InputError(
            f"model.rotary_pct = {m.rotary_pct} of head dim {m.head_dim} gives {m.rotary_dim} "
            "rotary dims: an even number of at least 2 is needed"
        )
    if t.batch_size % t.micro_batch_size:
        raise InputError(
            f"train.batch_size = {t.batch_size} is not divisible by "
            f"train.micro_batch_size = {t.micro_batch_size}"
        )
    _validate_precision(config)
    if not 0 <= t.seed < 2**32:
        raise InputError(f"train.seed = {t.seed}: expected a number in [0, 2^32)")
    if not 0 <= o.min_lr <= o.lr:
        raise InputError(f"optimizer.min_lr = {o.min_lr} is not in [0, optimizer.lr = {o.lr}]")
    if not 0 <= o.warmup < 1:
        raise InputError(f"optimizer.warmup = {o.warmup}: expected a share in [0, 1)")
    if not all(0 <= b < 1 for b in o.betas):
        raise InputError(f"optimizer.betas = {list(o.betas)}: expected numbers in [0, 1)")
    if o.step_offset < 0:
        raise InputError(f"optimizer.step_offset = {o.step_offset} must not be negative")
    if o.eps <= 0 or o.weight_decay < 0 or o.clip_eps < 0:
        raise InputError(
            f"optimizer: eps = {o.eps}, weight_decay = {o.weight_decay} and clip_eps = "
            f"{o.clip_eps} must not be negative, eps not 0"
        )
    if c.every < 0 or (c.steps != "pythia" and any(s < 0 for s in c.steps)):
        raise InputError("checkpoint: steps must not be negative")
    if config.log.sample and not d.tokenizer:
        raise InputError("log.sample needs data.tokenizer")


def _validate_precision(config: Config) -> None:
    p, t = config.precision, config.train
    if config.optimizer.states == "lean" and p.compute != "bf16":
        raise InputError(
            f"optimizer.states = 'lean' keeps bf16 weights, not precision.compute = {p.compute!r}: "
            "another recipe than the published one, as with --recipe modern"
        )
    if config.optimizer.states == "lean" and config.optimizer.backend == "torch":
        raise InputError("optimizer.states = 'lean' does not go with optimizer.backend = 'torch'")
    for key, value, other in (
        ("gradients", p.gradients, p.compute),
        ("gradient_sum", p.gradient_sum, p.gradients),
    ):
        if value not in ("fp32", other):
            wanted = f"{other}, fp32" if other != "fp32" else other
            raise InputError(f"precision.{key} = {value!r} does not go with {wanted}")
    if (p.loss_scaling == "none") == (p.compute == "fp16"):
        raise InputError(
            f"precision.loss_scaling = {p.loss_scaling!r} does not go with precision.compute = "
            f"{p.compute!r}: fp16 needs one, bf16 and fp32 have none"
        )
    if config.optimizer.backend == "torch" and p.gradients != "fp32":
        raise InputError(
            f"optimizer.backend = 'torch' takes fp32 gradients, not precision.gradients = "
            f"{p.gradients!r}"
        )
    if t.batch_size % (p.ranks * t.micro_batch_size):
        raise InputError(
            f"train.batch_size = {t.batch_size} is not divisible by precision.sum_ranks = "
            f"{p.sum_ranks} times train.micro_batch_size = {t.micro_batch_size}"
        )


def _positive(config: Config, name: str) -> None:
    section, _, key = name.partition(".")
    if getattr(getattr(config, section), key) <= 0:
        raise InputError(f"{name} = {getattr(getattr(config, section), key)} must be positive")
