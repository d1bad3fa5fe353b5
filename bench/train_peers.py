"""What a user would train Pythia with: ours, the reference, torch.compile, transformers.

Every implementation is a `Stepper` over the same weights and batch. The peers hold fp32
parameters and run under autocast with torch's fused AdamW and clip_grad_norm_, as their users do.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.runner import DTYPES
from pythia_fast.config import Config
from pythia_fast.data.indexed import beside, write_index
from pythia_fast.model import Pythia, materialise
from pythia_fast.ops import REFERENCE
from pythia_fast.train import Trainer

# of ours, by what differs in the configuration: "ours pythia-v1" computes as published
VARIANTS: dict[str, dict[str, Any]] = {
    "ours pythia-v1": {"recipe": "pythia-v1"},
    "ours any order": {"kernels.deterministic": False},
    "ours launch by launch": {"kernels.graph": False},
    "ours lean": {"optimizer.states": "lean", "precision.gradients": "bf16"},
}
ATTENTION = re.compile(r"aten::_scaled_dot_product_(\w*?attention(?:_math)?)")
Loss = Callable[[Tensor], Tensor]
Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Stepper:
    """model: its parameters are Pythia's in number, order and shape.

    step: one optimizer step on rows (B, T + 1) int64; the mean loss (nats a token) and the norm of
    the gradients before clipping, on the device. loss: the mean loss of rows alone. gradients: of
    that mean loss by Pythia's names, in fp32, one after the other.
    """

    model: nn.Module
    step: Callable[[Tensor], tuple[Tensor, Tensor]]
    loss: Loss
    gradients: Callable[[Tensor], Named]


def make(impl: str, config: Config, device: torch.device) -> Stepper:
    """An implementation of IMPLEMENTATIONS for a configuration, its weights drawn."""
    return IMPLEMENTATIONS[impl](config, device)


def on_trainer(
    config: Config, device: torch.device, backend: Literal["auto", "reference"]
) -> Stepper:
    """pythia_fast's own Trainer. backend: that of kernels and optimizer, "auto" or "reference"."""
    config = replace(config, kernels=replace(config.kernels, backend=backend))
    if backend == "reference":
        config = replace(config, optimizer=replace(config.optimizer, backend="torch"))
    with _token_files(config) as prefix:
        config = replace(config, data=replace(config.data, prefix=str(prefix), order="sequential"))
        trainer = Trainer(config, prefix.parent)
    if trainer.device != device:
        raise RuntimeError(f"the trainer runs on {trainer.device}, not on {device}")
    model, optimizer = trainer.model, trainer.optimizer
    if config.optimizer.states == "lean":  # the weights are half of the master
        draw_weights(model.named_parameters())
        optimizer.sync_weights(from_model=True)
    else:
        masters = optimizer.views(optimizer.master)
        draw_weights((name, masters[name]) for name, _ in model.named_parameters())
        optimizer.sync_weights()

    def gradients(rows: Tensor) -> Named:
        """Of fused blocks there are none but in the optimizer's buffer."""
        factor = optimizer.loss_factor
        for part in rows.split(config.train.micro_batch_size):
            model.loss(part, factor / rows[:, 1:].numel()).backward()
            optimizer.accumulate()
        optimizer.fresh = True
        for name, gradient in optimizer.views(optimizer.grad).items():
            yield name, gradient.float() / factor

    return Stepper(model, trainer.train_step, model.loss, gradients)


def state(stepper: Stepper) -> dict[str, Tensor]:
    """Weights and moments of a stepper of ours, as a checkpoint would hold them."""
    trainer = stepper.step.__self__  # type: ignore[attr-defined]
    assert isinstance(trainer, Trainer)
    return {name: t for name, t in trainer.optimizer.state().items() if isinstance(t, Tensor)}


def _taken(model: nn.Module) -> Named:
    """Every gradient, in fp32; each is freed as the next is asked for."""
    for name, parameter in model.named_parameters():
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            yield _ours(name), gradient.float()


@contextmanager
def _token_files(config: Config) -> Iterator[Path]:
    """Sparse files of enough tokens for the run; batches are handed in, so none is ever read."""
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as name:
        prefix = Path(name) / "document"
        rows = config.train.batch_size * config.train.steps
        size = np.array([rows * config.data.seq_len + 1], dtype=np.int32)
        with beside(prefix, ".idx").open("wb") as file:
            write_index(file, np.dtype("<u2"), size)
        with beside(prefix, ".bin").open("wb") as file:
            file.truncate(2 * int(size[0]))
        yield prefix


def compiled_reference(config: Config, device: torch.device) -> Stepper:
    """The reference model under torch.compile, with `_pinned` attention."""
    model = Pythia(config.model, REFERENCE)
    materialise(model, device, torch.float32)
    model.rotary_tables(config.data.seq_len, device)  # made now, not inside the compiled graph
    loss = _pinned(torch.compile(model.loss, dynamic=False), device)
    return _with_fused_adamw(config, device, model, loss)


def transformers_model(config: Config, device: torch.device, compiled: bool) -> Stepper:
    """transformers' GPTNeoXForCausalLM with torch's attention, `_pinned` as in "compile"."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    m = config.model
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(  # type: ignore[call-arg] # its base class takes these too
                vocab_size=m.vocab_size,
                hidden_size=m.hidden,
                num_hidden_layers=m.layers,
                num_attention_heads=m.heads,
                intermediate_size=4 * m.hidden,
                rotary_pct=m.rotary_pct,
                max_position_embeddings=config.data.seq_len,
                hidden_act={"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[m.activation],
                layer_norm_eps=m.norm_eps,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    model.to_empty(device=device)
    _restore_buffers(model, device)

    def mean(rows: Tensor) -> Tensor:
        logits = model(rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    loss = torch.compile(mean, dynamic=False) if compiled else mean
    return _with_fused_adamw(config, device, model, _pinned(loss, device))


def _restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Rotary frequencies are a buffer, which a model from the meta device has lost."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, type(module)(model.config).to(device))


def _with_fused_adamw(
    config: Config, device: torch.device, model: nn.Module, loss: Loss
) -> Stepper:
    draw_weights(model.named_parameters())
    o = config.optimizer
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if (p.dim() > 1) is matrix], "weight_decay": decay}
        for matrix, decay in ((True, o.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
    dtype = DTYPES[config.precision.compute]

    def precision() -> AbstractContextManager[Any]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def mean(rows: Tensor) -> Tensor:
        with precision():
            return loss(rows)

    def gradients(rows: Tensor) -> Named:
        mean(rows).backward()
        return _taken(model)

    def step(rows: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=device)
        for part in rows.split(config.train.micro_batch_size):
            share = mean(part) * (len(part) / len(rows))
            share.backward()
            total += share.detach()
        norm = nn.utils.clip_grad_norm_(parameters, o.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    return Stepper(model, step, mean, gradients)


def _pinned(loss: Loss, device: torch.device) -> Loss:
    """On a GPU attention by cuDNN where it takes the shape, else by flash: one choice for all."""
    if device.type == "cpu":
        return loss
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]

    def pinned(rows: Tensor) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return loss(rows)

    return pinned


def attention_backends(call: Callable[[], Any]) -> list[str]:
    """Which of torch's attentions a call ran, e.g. ["cudnn_attention"]; empty: kernels of ours."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    found = (ATTENTION.match(event.key) for event in recorded.key_averages())
    return sorted({match[1] for match in found if match})


@torch.no_grad()
def draw_weights(named: Named) -> None:
    """N(0, 1/√inputs) for matrices, 1 for norms, 0 for biases: the same in every implementation.

    named: fp32 tensors in the model's order, and by its names.

    Logits then are of order one, so that the loss depends on every op of the model.
    """
    generator: torch.Generator | None = None
    for name, parameter in named:
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(0)
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            drawn = torch.empty(parameter.shape, device=parameter.device)
            parameter.copy_(drawn.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator))


@torch.no_grad()
def reference_loss(config: Config, model: nn.Module, rows: Tensor) -> float:
    """The mean loss of rows by the reference model over the parameters of `model`, not copied."""
    oracle = Pythia(config.model, REFERENCE)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = _ours(name).rpartition(".")
        setattr(oracle.get_submodule(owner), leaf, parameter)
    return oracle.loss(rows).item()


def _ours(name: str) -> str:
    """transformers 5 calls the head lm_head; compiled modules carry a prefix."""
    return name.removeprefix("_orig_mod.").replace("lm_head.", "embed_out.")


IMPLEMENTATIONS: dict[str, Callable[[Config, torch.device], Stepper]] = {
    "ours": lambda c, d: on_trainer(c, d, "auto"),
    # the configuration is another
    **dict.fromkeys(VARIANTS, lambda c, d: on_trainer(c, d, "auto")),
    "eager": lambda c, d: on_trainer(c, d, "reference"),
    "compile": compiled_reference,
    "transformers": lambda c, d: transformers_model(c, d, compiled=False),
    "transformers-compile": lambda c, d: transformers_model(c, d, compiled=True),
}
