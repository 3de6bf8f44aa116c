"""How much prefill may run beside those who are decoding, so that nobody's stream stumbles.

A stream that takes a time d per token shall take at most 1.5 d while somebody else's prompt is read: prefill gets half as much time as
decode. Where many wait and few decode, more: what each gets is their share of those who want something.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maverick_jax.inference.scheduling.plans import Plan

SHARE = 0.5  # of the time of a decode step
FIXED = 128  # tokens per step where nothing is measured: processes of one run must agree
KEPT = 0.8  # of what was known, when a new measurement comes


class Pace:
    """Tokens of prefill per decode step, from the times of steps with and without any.

    Args:
      measured: False: a fixed number.
    """

    def __init__(self, *, measured: bool):
        self._measured = measured
        self._decode = self._per_token = 0.0  # seconds
        self._before: tuple[float, int, int] | None = None  # when the last plan was launched, its decoded rows and prefilled tokens

    @property
    def tokens(self) -> int:
        if not self._measured or not self._decode or not self._per_token:
            return FIXED
        return max(1, round(SHARE * self._decode / self._per_token))

    def begin(self, plan: Plan) -> None:
        """A plan is launched: the one before has been under way until now."""
        now = time.perf_counter()
        if self._before is not None:
            since, decoded, prefilled = self._before
            if decoded and not prefilled:
                self._decode = _smoothed(self._decode, now - since)
            elif prefilled:
                self._per_token = _smoothed(self._per_token, max(0.0, now - since - (self._decode if decoded else 0.0)) / prefilled)
        decoded = sum(len(call.parts) for call in plan.calls if call.kind == "decode")
        prefilled = sum(call.rows * call.tokens for call in plan.calls if call.kind == "prefill")
        self._before = (now, decoded, prefilled) if plan.calls else None


def _smoothed(known: float, new: float) -> float:
    return KEPT * known + (1 - KEPT) * new if known else new
