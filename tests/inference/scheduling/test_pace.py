"""How much prefill runs beside decoding follows from what both take, though steps are launched ahead of their reading."""

import pytest

from maverick_jax.inference.scheduling import pace
from maverick_jax.inference.scheduling.pace import Pace
from maverick_jax.inference.scheduling.plans import Call, Part, Plan

DECODE = Call("decode", (Part(0, 0, 0, 1, True, 0),), 1, 1, False)
PREFILL = Call("prefill", (Part(1, 1, 0, 32, False, 0),), 1, 32, False)


@pytest.mark.parametrize("every", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("piece", [0.2, 1.0, 3.0])
def test_a_piece_now_and_then(monkeypatch, every, piece):
    """A device that takes 1 s per decode step, and so long for each piece; the host waits for the draws of the step before."""
    now, paced, free, before = 0.0, Pace(), 0.0, 0.0
    monkeypatch.setattr(pace, "seconds_compiling", lambda since: 0.0)
    found = []
    for step in range(300):
        read = step > 20 and step % every == 0
        paced.begin(Plan(calls=(DECODE, PREFILL) if read else (DECODE,)), now)
        drawn = max(free, now) + 1.0
        free = drawn + (piece if read else 0.0)
        now, before = max(now, before), drawn
        found.append(paced.tokens)
    assert sum(found[100:]) / 200 == pytest.approx(pace.SHARE * 32 / piece, rel=0.25)


def test_a_turn_that_holds_something_else_says_little(monkeypatch):
    """A caller that does other things before a turn would make every step look long, and prompts cheap."""
    now, paced = 0.0, Pace()
    monkeypatch.setattr(pace, "seconds_compiling", lambda since: 0.0)
    for step in range(60):
        paced.begin(Plan(calls=(DECODE, PREFILL) if step % 8 == 7 else (DECODE,)), now)
        now += (2.0 if step % 8 == 7 else 1.0) + (20.0 if step % 8 == 4 else 0.0)
    assert paced.tokens < 3 * pace.SHARE * 32


def test_compiling_is_nobodys_time(monkeypatch):
    """A first call that compiles for a minute would leave no prompt any time for the rest of the day."""
    now, paced = 0.0, Pace()
    monkeypatch.setattr(pace, "seconds_compiling", lambda since: 60.0 if since == 10.0 else 0.0)
    for step in range(18):
        paced.begin(Plan(calls=(DECODE, PREFILL) if step % 2 else (DECODE,)), now)
        now += (2.0 if step % 2 else 1.0) + (60.0 if now == 10.0 else 0.0)
    assert paced.tokens == pytest.approx(pace.SHARE * 32, rel=0.25)
