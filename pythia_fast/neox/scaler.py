"""Loss scaling of a checkpoint: ours, and DeeperSpeed's LossScaler and DynamicLossScaler.

`delayed_shift` is the number of overflows until a halving: 2 is our "hysteresis", 1 "dynamic". A
LossScaler holds a constant. Source: DeeperSpeed loss_scaler.py:60-168. With a delayed_shift of 1
it doubles an iteration earlier than the path without ZeRO, whose rule "dynamic" is.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pythia_fast.errors import InputError
from pythia_fast.loss_scale import FACTOR, HYSTERESIS, MAX_SKIPPED, MINIMUM, WINDOW, LossScale
from pythia_fast.neox.files import LossScaler

Kind = Literal["none", "dynamic", "hysteresis"]
_SHIFTS: dict[int, Kind] = {1: "dynamic", HYSTERESIS: "hysteresis"}
_FIXED = {
    "scale_window": WINDOW,
    "scale_factor": FACTOR,
    "min_scale": MINIMUM,
    "consecutive_hysteresis": False,
}


def to_neox(state: dict[str, Any] | None) -> LossScaler:
    """The scaler of a `LossScale.state`, or a constant 1 where nothing was scaled."""
    if state is None:
        return LossScaler(cur_scale=1.0)
    hysteresis = state["hysteresis"]
    return LossScaler(
        cur_scale=state["scale"],
        cur_iter=state["iteration"],
        last_overflow_iter=state["last_overflow"],
        **_FIXED,
        delayed_shift=HYSTERESIS if hysteresis else 1,
        cur_hysteresis=state["chances"] if hysteresis else 1,
        raise_error_at_min_scale=hysteresis,
    )


def from_neox(scaler: Any, skipped_in_a_row: Any, where: str) -> tuple[Kind, dict[str, Any] | None]:
    """The kind of loss scaling and its `LossScale.state`, None for a constant.

    Raises InputError naming the attribute that is not that of such a scaler, or that no
    `LossScale` follows.
    """
    if not isinstance(scaler, LossScaler):
        raise InputError(f"{where}: loss_scaler is missing")
    values = vars(scaler)
    scale: Any = values.get("cur_scale")
    if type(scale) not in (int, float) or not math.isfinite(scale) or scale < MINIMUM:
        raise _wrong(where, "cur_scale", scale, f"a number of at least {MINIMUM:g}")
    if "cur_iter" not in values:
        return "none", None
    for name, wanted in _FIXED.items():
        if values.get(name, wanted) != wanted:
            raise _wrong(where, name, values[name], repr(wanted))
    shift = values.get("delayed_shift")
    if type(shift) is not int or shift not in _SHIFTS:
        raise _wrong(where, "delayed_shift", shift, "1 or 2")
    iteration = _whole(values, "cur_iter", 0, None, where)
    last = _whole(values, "last_overflow_iter", -1, iteration - 1, where)
    chances = _whole(values, "cur_hysteresis", 1, shift, where)
    skipped = _whole({"skipped_in_a_row": skipped_in_a_row}, "skipped_in_a_row", 0,
                     MAX_SKIPPED - 1, where)  # fmt: skip
    kind = _SHIFTS[shift]
    hysteresis = kind == "hysteresis"
    state = LossScale(
        hysteresis=hysteresis,
        scale=float(scale),
        iteration=iteration,
        last_overflow=last,
        chances=chances if hysteresis else HYSTERESIS,
        skipped_in_a_row=skipped,
    )
    return kind, state.state()


def _whole(values: dict[str, Any], name: str, low: int, high: int | None, where: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise _wrong(where, name, value, f"a whole number {wanted}")
    return value


def _wrong(where: str, name: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{where}: {name} of the loss scaler is {value!r}, expected {wanted}")
