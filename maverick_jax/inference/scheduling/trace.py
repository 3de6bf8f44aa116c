"""What a scheduler was told and what it planned, one event per line, and the same again from such a file, without a model.

A line is a JSON object: first the limits, then what was called, in order; limits again where an engine began anew.
Prompts stand there as their tokens' keys.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from maverick_jax.errors import UserError
from maverick_jax.inference.request import Finish, Request, Row
from maverick_jax.inference.scheduling.plans import Limits, Plan
from maverick_jax.inference.scheduling.scheduler import Scheduler


class Recording(Scheduler):
    """A scheduler that writes down what happens to it.

    Args:
      stream: text, that gets a line per event.
    """

    def __init__(self, limits: Limits, stream: TextIO):
        super().__init__(limits)
        self._stream = stream
        self._write(limits=dataclasses.asdict(limits))

    def add(self, request: Request, keys: Sequence[int], now: float, *, ahead: bool = True, reusable: int | None = None) -> Row:
        row = super().add(request, keys, now, ahead=ahead, reusable=reusable)
        asked = {"max_new_tokens": request.max_new_tokens, "deadline": request.deadline}
        self._write(add=row.number, keys=row.keys, now=now, ahead=ahead, reusable=row.reusable, **asked)
        return row

    def cancel(self, row: Row) -> None:
        if row.finish is None:
            self._write(cancel=row.number)
        super().cancel(row)

    def finish(self, row: Row, why: Finish) -> None:
        if why not in (Finish.CANCELLED, Finish.DEADLINE):  # those come from inside
            self._write(finish=row.number, why=why.value)
        super().finish(row, why)

    def deliver(self, row: Row, key: int) -> None:
        if row.finish is None:
            self._write(deliver=row.number, key=key)
        super().deliver(row, key)

    def accept(self, row: Row, tokens: int) -> None:
        if row.finish is None:
            self._write(accept=row.number, tokens=tokens)
        super().accept(row, tokens)

    def plan(self, now: float, budget: int, drafts: Mapping[int, int] | None = None) -> Plan:
        plan = super().plan(now, budget, drafts)
        self._write(plan=plan, now=now, budget=budget, drafts=list((drafts or {}).items()))
        return plan

    def _write(self, **event: Any) -> None:
        self._stream.write(json.dumps(event, default=vars, separators=(",", ":")) + "\n")


def replay(lines: Iterable[str]) -> Iterator[tuple[Scheduler, Plan]]:
    """Tell a new scheduler what an old one was told.

    Yields:
      the scheduler and its plan, after each plan.

    Raises:
      UserError: a line that is no event, or a plan that is another now than then.
    """
    scheduler, rows = None, {}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if scheduler is None or "limits" in event:  # the engine began anew
                lists = {name: tuple(value) for name, value in event["limits"].items() if isinstance(value, list)}
                scheduler, rows = Scheduler(Limits(**event["limits"] | lists)), {}
                continue
            plan = _tell(scheduler, rows, event)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"line {number} is no event of a trace, or one that cannot be here ({error!r}): record it again.") from error
        if plan is not None:
            if json.loads(plan.as_json()) != event["plan"]:
                raise UserError(f"line {number} is not what this scheduler plans, which is {plan.as_json()}: record the trace again.")
            yield scheduler, plan


def _tell(scheduler: Scheduler, rows: dict[int, Row], event: dict[str, Any]) -> Plan | None:
    match event:
        case {"add": row, "keys": keys, "max_new_tokens": most, "deadline": deadline, "now": now, "ahead": ahead} as told:
            request = Request(ids=keys, max_new_tokens=most, deadline=deadline)  # the ids themselves decide nothing
            rows[row] = scheduler.add(request, keys, now, ahead=ahead, reusable=told.get("reusable"))
        case {"cancel": row}:
            scheduler.cancel(rows[row])
        case {"finish": row, "why": why}:
            scheduler.finish(rows[row], Finish(why))
        case {"deliver": row, "key": key}:
            scheduler.deliver(rows[row], key)
        case {"accept": row, "tokens": tokens}:
            scheduler.accept(rows[row], tokens)
        case {"plan": dict(), "now": now, "budget": budget, "drafts": drafts}:
            return scheduler.plan(now, budget, dict(drafts))
        case _:
            raise ValueError("it is of no known kind")
    return None
