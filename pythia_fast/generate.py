"""Continues prompts with a KV cache: `pythia-fast generate CKPT --prompt TEXT`.

Prompts of different lengths share a batch: shorter ones are padded on the left, and every token
keeps the position that it has in its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pythia_fast import checkpoint
from pythia_fast.data.build import END_OF_TEXT, load_tokenizer
from pythia_fast.errors import InputError
from pythia_fast.kernels import reference
from pythia_fast.model import Attend, Pythia, materialise
from pythia_fast.ops import select


class Cache:
    """Keys and values (L, B, H, length, D) of every layer, and where each row's prompt begins."""

    def __init__(self, model: Pythia, padding: Tensor, length: int) -> None:
        """padding (B,) int64: how many positions on the left of each row are padding."""
        c, weight = model.config, model.embed_out.weight
        shape = (c.layers, len(padding), c.heads, length, c.head_dim)
        self._keys, self._values = torch.zeros(2, *shape, dtype=weight.dtype, device=weight.device)
        self._decode, self._padding = model.ops.attention_decode, padding
        self._cos, self._sin = model.rotary_tables(length, weight.device)
        self.filled = 0

    def attend(self, count: int) -> list[Attend]:
        """One callable a layer for the next `count` positions; advances when all have run."""
        start, end = self.filled, self.filled + count
        self.filled = end
        at = torch.arange(start, end, device=self._padding.device)
        own = (at[None, :] - self._padding[:, None]).clamp(min=0)  # (B, count) in each prompt
        cos, sin = self._cos[own].flatten(0, 1), self._sin[own].flatten(0, 1)
        first = self._padding.int()

        def attend_layer(keys: Tensor, values: Tensor) -> Attend:
            def attend(qkv: Tensor) -> Tensor:
                rotated = reference.rotary(qkv.flatten(0, 1)[None], cos, sin).view_as(qkv)
                q, k, v = rotated.chunk(3, dim=-1)  # (B, count, H, D)
                keys[:, :, start:end] = k.transpose(1, 2)
                values[:, :, start:end] = v.transpose(1, 2)
                return self._decode(q, keys, values, end, first)

            return attend

        return [attend_layer(k, v) for k, v in zip(self._keys, self._values, strict=True)]


@torch.no_grad()
def generate(
    model: Pythia,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_id: int | None = 0,
) -> list[list[int]]:
    """The continuation of each prompt, at most max_new_tokens ids, without the prompt.

    temperature 0 takes the likeliest token; above 0 samples from softmax(logits/temperature) with
    `seed`. A row ends after stop_id (the end-of-document token), which is not returned.
    """
    if not prompts or any(not prompt for prompt in prompts):
        raise InputError("generate: every prompt needs at least one token")
    device = model.embed_out.weight.device
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    cache = Cache(model, padding, longest + max_new_tokens)
    generator = torch.Generator(device=device).manual_seed(seed)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    columns = []
    for _ in range(max_new_tokens):
        logits = model(tokens, cache.attend(tokens.shape[1]))[:, -1].float()  # (B, V)
        if temperature > 0:
            p = torch.softmax(logits / temperature, dim=-1)
            tokens = torch.multinomial(p, 1, generator=generator)
        else:
            tokens = logits.argmax(dim=-1, keepdim=True)
        columns.append(tokens[:, 0])
        if stop_id is not None:
            done |= tokens[:, 0] == stop_id
            if done.all():
                break
    rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in prompts]
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Pythia:
    """The model of a checkpoint folder, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Pythia(checkpoint.config_of(path).model, select("auto", device))
    tensors = checkpoint.load_all(path, prefix="model.")
    materialise(model, device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model


def continue_texts(
    path: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> list[dict[str, Any]]:
    """{"prompt", "tokens": generated ids, "text": their text} for each prompt, by a checkpoint."""
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise InputError("--max-new-tokens must be at least 1 and --temperature at least 0")
    config = checkpoint.config_of(path)
    own = config.data.tokenizer
    if not tokenizer and not own:
        raise InputError(f"{path}: the run named no tokenizer; name one with --tokenizer FILE")
    coder = load_tokenizer(tokenizer or own, config.model.vocab_size)
    encoded = [coder.encode(prompt).ids for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise InputError(f"--prompt {prompt!r} has no tokens")
    model = load_model(path)
    rows = generate(
        model, encoded, max_new_tokens, temperature, seed, coder.token_to_id(END_OF_TEXT)
    )
    return [
        {"prompt": prompt, "tokens": row, "text": coder.decode(row)}
        for prompt, row in zip(prompts, rows, strict=True)
    ]
