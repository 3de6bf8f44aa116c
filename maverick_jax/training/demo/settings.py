"""How much of everything the demo does."""

from __future__ import annotations

import dataclasses

MINUTES = 15.0  # of two cores: the settings as they stand took 11, beside other programs


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for a stage and its control.

    Attributes:
      held_out: questions that every model is asked, which are the same whatever the seed.
      tries: of those, how many are asked for pass@k.
      pool: questions that the base is the judge of; from one half SFT's are chosen, from the other RL's.
      group: answers to a question where several are drawn: by the judge, for pass@k, and in a group of RL.
      easy: share of right answers above which a question is not kept for SFT.
      epochs: of SFT, through what was kept.
      rows: of a batch of SFT; half as many pairs of one of DPO.
      rl_seconds: of RL, without steps that compile.
      prompts: of a step of RL.
      preferred: questions that pairs for DPO are drawn from.
      rates: the highest learning rates of SFT, RL and DPO.
      answer: tokens of an answer at most.
      length: tokens of a question and its answer at most.
      slots: answers drawn at once.
    """

    held_out: int = 4000
    tries: int = 250
    pool: int = 533
    group: int = 8
    easy: float = 0.75
    epochs: float = 3.0
    rows: int = 32
    rl_seconds: float = 40.0
    prompts: int = 8
    preferred: int = 160
    rates: tuple[float, float, float] = (2e-4, 2e-4, 5e-5)
    answer: int = 14
    length: int = 80
    slots: int = 64


def in_minutes(minutes: float) -> Settings:
    """For about so many minutes; what is held out stays as much, so that results can be compared."""
    share, usual = minutes / MINUTES, Settings()
    return dataclasses.replace(
        usual,
        pool=max(2 * usual.rows, round(usual.pool * share)),
        preferred=max(usual.rows, round(usual.preferred * share)),
        rl_seconds=usual.rl_seconds * share,
    )
