"""What was measured, as a table and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.plan.case import Case
from maverick_jax.plan.report import aligned


class Quantiles(NamedTuple):
    """Seconds that a half, nine of ten, and 99 of 100 stay below."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        return cls(*np.quantile(seconds, (0.5, 0.9, 0.99)).tolist())


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that were served side by side.

    Attributes:
      size: how many.
      prefill_rate, decode_rate: tokens per second, all rows together; of decoding while all of them did.
      prefill_bytes, prefill_products, decode_bytes, decode_products: of the time taken, what reading the bytes and making the products
        takes at least: 1 is the limit.
      first: seconds until a request had its first token.
      between: seconds from one token of a request to the next.
      compiling: seconds of the timed run in which something was compiled: 0 if nothing disturbed it.
    """

    size: int
    prefill_rate: float
    prefill_bytes: float
    prefill_products: float
    first: Quantiles
    decode_rate: float
    decode_bytes: float
    decode_products: float
    between: Quantiles
    compiling: float


@dataclasses.dataclass(frozen=True)
class Random:
    """Requests that came at random times.

    Attributes:
      rate: how many per second were sent, on average.
      served_rate, token_rate: requests and new tokens per second, from the beginning to the last one's end.
      first: seconds from a request's coming to its first token, waiting included.
      between, compiling: as of `Batch`.
    """

    rate: float
    requests: int
    served_rate: float
    token_rate: float
    first: Quantiles
    between: Quantiles
    compiling: float


@dataclasses.dataclass(frozen=True)
class Report:
    """`str(report)` is what `maverick bench` prints.

    Attributes:
      machine: its rates, and where they come from.
      case: what the limits were worked out for, with the largest batch.
      prompt, new: tokens of a prompt and of an answer.
      random: None if no requests came at random.
    """

    machine: str
    case: Case
    prompt: int
    new: int
    batches: tuple[Batch, ...]
    random: Random | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds and tokens per second, unrounded."""
        case = self.case
        return {
            "machine": self.machine,
            "devices": case.topology.devices,
            "mesh": dict(case.mesh.shape),
            "layout": case.layout.name,
            "dtype": case.dtype,
            "prompt": self.prompt,
            "new": self.new,
            "batches": [_values(batch) for batch in self.batches],
            "random": None if self.random is None else _values(self.random),
        }

    def __str__(self) -> str:
        case = self.case
        head = [
            self.machine,
            f"mesh {case.mesh_name}, layout {case.layout.name}, {case.dtype}; {self.prompt:,} tokens a prompt, {self.new:,} an answer",
        ]
        parts = [head, self._prefill(), self._decode(), *([_random(self.random)] if self.random else [])]
        return "\n\n".join("\n".join(part) for part in parts) + self._note()

    def _prefill(self) -> list[str]:
        return _table(
            ("prefill", "tokens/s", "of bytes", "of products", "first token, ms: median", "90 %", "99 %", ""),
            [(b.size, b.prefill_rate, b.prefill_bytes, b.prefill_products, b.first) for b in self.batches],
        )

    def _decode(self) -> list[str]:
        return _table(
            ("decode", "tokens/s", "of bytes", "of products", "between tokens, ms: median", "90 %", "99 %", ""),
            [(b.size, b.decode_rate, b.decode_bytes, b.decode_products, b.between) for b in self.batches],
        )

    def _note(self) -> str:
        compiling = max(part.compiling for part in (*self.batches, *([self.random] if self.random else [])))
        return f"\n\nnote: {compiling:.1f} s of a timed run went into compiling: measure again." if compiling > 0 else ""


def _table(head: tuple[str, ...], rows: list[tuple[int, float, float, float, Quantiles]]) -> list[str]:
    cells = [
        (f"batch {size:,}", _rate(rate), f"{memory:.0%}", f"{products:.0%}", *_milliseconds(quantiles))
        for size, rate, memory, products, quantiles in rows
    ]
    return aligned([head, *cells])


def _random(random: Random) -> list[str]:
    return [
        f"{random.requests:,} requests at random, {random.rate:g} per second: {_rate(random.served_rate)} per second served, "
        f"{_rate(random.token_rate)} new tokens/s",
        *aligned(
            [
                ("ms", "median", "90 %", "99 %", ""),
                ("first token", *_milliseconds(random.first)),
                ("between tokens", *_milliseconds(random.between)),
            ]
        ),
    ]


def _milliseconds(quantiles: Quantiles) -> tuple[str, ...]:
    """Cells of a table, and an empty one: the last is not aligned."""
    return (*(f"{1000 * value:,.1f}" for value in quantiles), "")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _values(part: Batch | Random) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Quantiles) else value for name, value in vars(part).items()}
