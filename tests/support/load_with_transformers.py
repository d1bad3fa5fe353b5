"""Loads directories with the transformers that PYTHONPATH names; a JSON object a line on stdout.

    python load_with_transformers.py DIR ...

Its own program, so that another major version can be asked than the one the tests run under.
DIR.expected.safetensors holds "tokens" (B, T) and the expected "logits" (B, T, V).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Hello  world\n\n  def f(x):\n\treturn é 😀 <|endoftext|> 1234 naïve"


@torch.no_grad()
def load(directory: Path) -> dict[str, Any]:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    report = {
        "version": transformers.__version__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "dtype": str(model.dtype),
        "eos": [model.config.eos_token_id, model.generation_config.eos_token_id],
        "bos": [model.config.bos_token_id, model.generation_config.bos_token_id],
        "activation": model.config.hidden_act,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }
    expected = load_file(directory.with_name(f"{directory.name}.expected.safetensors"))
    logits = model.float()(expected["tokens"]).logits
    report["error"] = (logits - expected["logits"]).abs().max().item()
    if (directory / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(TEXT)["input_ids"]
        report["ids"], report["text"] = ids, tokenizer.decode(ids)
        report["eos_token"] = [tokenizer.eos_token, tokenizer.eos_token_id]
    return report


for argument in sys.argv[1:]:
    print(json.dumps(load(Path(argument))))
