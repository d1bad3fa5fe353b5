"""transformers' GPTNeoXForCausalLM with the weights of one of our models: the model's oracle."""

from __future__ import annotations

from typing import Any

import torch

from pythia_fast.config import Model
from pythia_fast.model import Pythia, materialise


def small(hidden: int, heads: int, layers: int = 2, **more: Any) -> Model:
    return Model(layers=layers, hidden=hidden, heads=heads, vocab_size=211, **more)


def randomised(c: Model, dtype: torch.dtype = torch.float32, module: Any = None) -> Pythia:
    """A model whose every parameter, biases and LayerNorms too, is random: no fault can hide."""
    model = Pythia(c) if module is None else module.Pythia(c)
    materialise(model, "cpu", dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(
                1.0 if "norm.weight" in name else 0.0, 0.5 if p.ndim == 1 else p.shape[1] ** -0.5
            )
    return model


def transformers_twin(model: Pythia, attention: str = "eager") -> Any:
    """The same function and weights in transformers; names must match one to one."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    c = model.config
    config = GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=4 * c.hidden,
        hidden_act="gelu_pytorch_tanh" if c.activation == "gelu_tanh" else "gelu",
        rotary_pct=c.rotary_pct,
        rotary_emb_base=c.rotary_base,
        max_position_embeddings=2048,
        layer_norm_eps=c.norm_eps,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
    )
    twin = GPTNeoXForCausalLM(config).to(model.embed_out.weight.dtype)
    state = {k: v for k, v in model.state_dict().items() if k != "embed_out.weight"}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert len(missing) == 1, missing  # the head, whose name depends on the version
    with torch.no_grad():
        twin.get_output_embeddings().weight.copy_(model.embed_out.weight)
    return twin
