"""Files of GPT-NeoX: pickles that may hold tensors and a few plain records, and YAML pages.

torch's weights-only unpickler does the reading; beyond tensors and containers it is allowed
DeeperSpeed's loss scaler (as a record without behaviour) and numpy's arrays (a random state).
"""

from __future__ import annotations

import _codecs
import io
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

from pythia_fast.errors import InputError
from pythia_fast.storage import write_synced

_SCALERS = "deepspeed.runtime.fp16.loss_scaler"


class LossScaler:
    """The attributes of DeeperSpeed's LossScaler (cur_scale) or DynamicLossScaler (others too)."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


_rebuild_array = np.zeros(1).__reduce__()[0]  # private, and moved between numpy 1 and 2
_ALLOWED: list[Any] = [
    (LossScaler, f"{_SCALERS}.LossScaler"),
    (LossScaler, f"{_SCALERS}.DynamicLossScaler"),
    (_rebuild_array, "numpy.core.multiarray._reconstruct"),
    (_rebuild_array, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (_codecs.encode, "_codecs.encode"),
]


def read_pt(file: Path) -> dict[str, Any]:
    """A dict saved by torch.save, on the CPU. Raises InputError where the file is anything else."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except Exception as error:  # a damaged or forged pickle makes torch.load raise nearly anything
        raise InputError(f"{file} cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a state dict")
    return content


def _reason(error: Exception) -> str:
    """One line; torch's own advice, to load the file without limits, is left out."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"{refused[1]} is not allowed in it"
    if isinstance(error, pickle.UnpicklingError):
        return "its pickle is not that of a checkpoint"
    return str(error).partition("\n")[0] or type(error).__name__


def write_pt(file: Path, content: dict[str, Any]) -> None:
    """torch.save, synced to disk, with loss scalers under the name that DeeperSpeed gives them."""
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__="pickle"))
    write_synced(file, buffer.getvalue())


class _Pickler(pickle._Pickler):
    """The pickler in Python, whose `save` can be replaced."""

    def save(self: Any, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, LossScaler):  # a new instance of the class, then its attributes
            name = "DynamicLossScaler" if hasattr(obj, "cur_iter") else "LossScaler"
            self.write(pickle.GLOBAL + f"{_SCALERS}\n{name}\n".encode())
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            pickle._Pickler.save(self, vars(obj))  # type: ignore[attr-defined]
            self.write(pickle.BUILD)
            return None
        return pickle._Pickler.save(self, obj, save_persistent_id)  # type: ignore[attr-defined]


def read_yaml(file: Path) -> dict[str, Any]:
    """Keys of a GPT-NeoX page, "-" as "_". Raises InputError, also where sizes cannot be meant.

    The suite's 12b-deduped page has its layers and heads swapped: 36 heads do not divide 5120.
    """
    try:
        page = yaml.safe_load(file.read_text(encoding="utf-8").replace("\t", " "))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is not YAML: {reason}") from None
    if not isinstance(page, dict):
        raise InputError(f"{file} is not a page of keys")
    keys = {str(key).replace("-", "_"): value for key, value in page.items()}
    hidden, heads, layers = (
        keys.get(k) for k in ("hidden_size", "num_attention_heads", "num_layers")
    )
    if isinstance(hidden, int) and isinstance(heads, int) and (heads < 1 or hidden % heads):
        swapped = isinstance(layers, int) and layers > 0 and hidden % layers == 0
        hint = f"; num-layers = {layers} does: the two are swapped" if swapped else ""
        raise InputError(
            f"{file}: num-attention-heads = {heads} does not divide hidden-size = {hidden}{hint}"
        )
    return keys
