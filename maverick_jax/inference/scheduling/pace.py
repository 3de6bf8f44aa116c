"""How much prefill may run beside those who are decoding, so that nobody's stream stumbles.

A stream that takes a time d per token shall take at most 1.5 d while somebody else's prompt is read: prefill gets a quarter of the
time of decode, since steps between pieces are a little slower than among their like, and more where many prompts are read beside few
rows that decode (`prefill.for_many`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maverick_jax.inference.clock import seconds_compiling

if TYPE_CHECKING:
    from maverick_jax.inference.scheduling.plans import Plan

SHARE = 0.25  # of the time of a decode step
FIXED = 128  # tokens per step while nothing is measured, or where several processes must come to the same
KEPT = 0.8  # of what was known of a step, when a new measurement comes
KEPT_OF_PREFILL = 0.6  # pieces of other sizes take other times
MOST = 1.2  # times the step that is known, when a longer one comes
BEHIND = 3  # plans: so much later it is seen how long a prefill took that draws nothing, since steps are launched ahead


class Pace:
    """Tokens of prefill per decode step, from the times of steps with and without any."""

    def __init__(self) -> None:
        self._decode = 0.0  # seconds of a step without prefill
        self._spent = self._read = 0.0  # seconds of prefill and its tokens, the latest count most
        self._unknown = 0.0  # seconds of prefill whose tokens are not counted yet
        self._since: float | None = None  # when the last plan was launched
        self._last = [(0, 0)] * BEHIND  # decoded rows and prefilled tokens of the last plans

    @property
    def tokens(self) -> int:
        if not self._decode or not self._spent or not self._read:
            return FIXED
        return max(1, round(SHARE * self._decode * self._read / self._spent))

    def begin(self, plan: Plan, now: float) -> None:
        """A plan is launched: until `now`, of `time.perf_counter`, the host and the devices have worked on the ones before."""
        (_, prefilled), (decoded, _) = self._last[0], self._last[-1]
        if self._since is not None and not seconds_compiling(self._since):
            took = now - self._since
            if any(tokens for _, tokens in self._last):
                # In which of the plans since its launch a prefill takes its time is not known: it is added up until the last of them.
                self._unknown += max(0.0, took - (self._decode if decoded else 0.0))
                if prefilled:
                    self._spent = KEPT_OF_PREFILL * self._spent + self._unknown
                    self._read = KEPT_OF_PREFILL * self._read + prefilled
                    self._unknown = 0.0
            elif decoded:
                # A turn may hold more than a step: what its caller did before it, or another process.
                self._decode = _smoothed(self._decode, min(took, MOST * self._decode) if self._decode else took)
        decoded = sum(len(call.parts) for call in plan.calls if call.kind == "decode")
        prefilled = sum(call.rows * call.tokens for call in plan.calls if call.kind == "prefill")
        self._last = [*self._last[1:], (decoded, prefilled)]
        self._since = now if plan.calls else None


def _smoothed(known: float, new: float) -> float:
    return KEPT * known + (1 - KEPT) * new if known else new
