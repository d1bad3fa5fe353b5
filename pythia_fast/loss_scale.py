"""Dynamic loss scaling for fp16, as DeeperSpeed had it: with hysteresis (ZeRO) and without.

The loss is multiplied by S before backward, so that small gradients survive fp16. A step whose
gradients are not finite is skipped: no update, no schedule, but its data are used up. Every step,
skipped or not, counts in `iteration`; `last_overflow` is the iteration of the newest overflow.

    hysteresis (DeeperSpeed loss_scaler.py:102-168)
      overflow   chances = 1: S = max(S/2, 1), an error where S is 1 already; else chances -= 1
      clean      (iteration − last_overflow) mod 1000 = 0: S = 2S, chances = 2
    dynamic (fused_optimizer.py:363-393, the path without ZeRO)
      overflow   S = max(S/2, 1)
      clean      (iteration − last_overflow − 1) mod 1000 = 0, and not 0: S = 2S

last_overflow starts at −1, so the first growth is at the 1000th iteration with hysteresis and at
the 1001st without; chances are refilled by growth alone. 50 skipped steps in a row end the run
(GPT-NeoX v1.0 utils.py:338-359).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pythia_fast.errors import CheckError, InputError

INITIAL, MINIMUM, FACTOR = 2.0**12, 1.0, 2.0
WINDOW = 1000  # iterations
HYSTERESIS = 2  # overflows until a halving
MAX_SKIPPED = 50  # in a row


@dataclass
class LossScale:
    """The state machine; `state` and `load` carry it through a checkpoint, exactly."""

    hysteresis: bool
    scale: float = INITIAL
    iteration: int = 0
    last_overflow: int = -1
    chances: int = HYSTERESIS
    skipped_in_a_row: int = 0

    def update(self, overflow: bool) -> None:
        """Counts one step. Raises CheckError at the minimum, or after 50 skipped in a row."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if overflow else 0
        if overflow:
            self._overflow()
        elif self._grows():
            self.scale *= FACTOR
            self.chances = HYSTERESIS
        self.iteration += 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise CheckError(f"{MAX_SKIPPED} steps in a row overflowed in fp16")

    def _overflow(self) -> None:
        if not self.hysteresis or self.chances == 1:
            if self.hysteresis and self.scale == MINIMUM:
                raise CheckError(f"overflow in fp16 with the loss scale at its minimum {MINIMUM:g}")
            self.scale = max(self.scale / FACTOR, MINIMUM)
        else:
            self.chances -= 1
        self.last_overflow = self.iteration

    def _grows(self) -> bool:
        clean = self.iteration - self.last_overflow
        return clean % WINDOW == 0 if self.hysteresis else clean > 1 and (clean - 1) % WINDOW == 0

    def state(self) -> dict[str, Any]:
        """Plain JSON values; S is a power of two, exact in any spelling."""
        return asdict(self)

    def load(self, state: Any) -> None:
        """Continues from `state`. Raises InputError where it is not the state of such a scale."""
        mine = self.state()
        if not isinstance(state, dict) or {k: type(v) for k, v in state.items()} != {
            k: type(v) for k, v in mine.items()
        }:
            raise InputError(f"loss scale: {state!r} is not a state with {', '.join(mine)}")
        if state["hysteresis"] != self.hysteresis:
            raise InputError("loss scale: the state is of the other kind of loss scaling")
        for key, value in state.items():
            setattr(self, key, value)
