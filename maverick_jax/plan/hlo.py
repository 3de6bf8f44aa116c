"""What one execution of a compiled program moves on one device: bytes of HBM and collectives, from its text.

The rule:

- An instruction reads its operands and writes its result as far as they lie in HBM; on-chip memory costs nothing.
  Inside a fusion nothing is counted but what its parameters and its result make of HBM.
- An asynchronous copy counts once, where it starts.
- A loop's body counts as often as its known trip count says (once where it is not known), a call's as often as it is called.
  The branches of a conditional and the condition of a loop are not looked into.
- A slice, dynamic slice or gather reads what it takes out. A dynamic-update-slice, or a scatter in a fusion, writes its update
  and does not read what it leaves alone. What a custom call updates in place is not counted.
- Everything else reads whole operands: a grouped matmul reads the weights of all local experts.

A collective's payload is its operands; an all-gather's is its result.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from maverick_jax.plan.hlo_bytes import bytes_moved, opcode_started
from maverick_jax.plan.hlo_text import Array, Arrays, Instruction, Program, parse_program, size

COLLECTIVES = frozenset("all-gather all-reduce all-to-all collective-broadcast collective-permute ragged-all-to-all reduce-scatter".split())
_MOVES_NOTHING = frozenset(
    "after-all bitcast bitcast-convert constant get-tuple-element iota opt-barrier parameter partition-id replica-id tuple".split()
)
_NOT_LOOKED_INTO = "conditional"  # which branch runs, the text does not say


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind: how many run in one execution, and the bytes one device gives to them."""

    count: int
    payload: int


@dataclass(frozen=True)
class Row:
    """What instructions that look alike move together; `count` is how often one of them runs in one execution."""

    bytes: int
    opcode: str
    count: int
    shapes: str
    op_name: str


@dataclass(frozen=True)
class Traffic:
    """What one execution moves on one device.

    Attributes:
      read, written: bytes of HBM.
      collectives: by kind, such as `all-reduce`.
      rows: all contributors to the bytes, the largest first.
      loops: while loops in the text.
      loops_counted_once: those among them whose trip count the text does not say. TPU texts do not say it even for a scan
        (libtpu 0.0.42): with layers in a loop the program moves more than this count.
      custom_calls: how often each target runs.
      launches: instructions that run: what a GPU's host has to launch, kernels, copies and collectives, each of which takes its time
        however little it does.
    """

    read: int
    written: int
    collectives: dict[str, Collective]
    rows: tuple[Row, ...]
    loops: int
    loops_counted_once: int
    custom_calls: dict[str, int]
    launches: int

    @property
    def hbm(self) -> int:
        return self.read + self.written


def count_traffic(hlo_text: str) -> Traffic:
    """Count HBM traffic and collectives of a compiled program; the rule stands at the top of this file.

    Args:
      hlo_text: what `compiled.as_text()` returns, for TPU, GPU or CPU. Only TPU texts mark on-chip memory; for the others
        every operand counts as HBM.

    Raises:
      UserError: the text is not that of a compiled program.
    """
    program = parse_program(hlo_text)
    read = written = loops = loops_counted_once = launches = 0
    collectives: dict[str, Counter[str]] = defaultdict(Counter)
    rows: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    custom_calls: Counter[str] = Counter()
    for step in _steps(program, program.entry, times=1):
        instruction = step.instruction
        if instruction.opcode == "while":
            loops += 1
            loops_counted_once += _known_trips(instruction) is None
            continue
        launches += step.times
        reads, writes = (step.times * moved for moved in bytes_moved(instruction, step.operands, program))
        read += reads
        written += writes
        rows[_look(step)].update(bytes=reads + writes, count=step.times)
        if kind := _collective_kind(instruction, program):
            collectives[kind].update(count=step.times, payload=step.times * _payload(kind, step))
        if instruction.opcode == "custom-call":
            custom_calls[instruction.attribute(r'custom_call_target="([^"]*)"') or "?"] += step.times
    return Traffic(
        read=read,
        written=written,
        collectives={kind: Collective(sums["count"], sums["payload"]) for kind, sums in collectives.items()},
        rows=_largest_first(rows),
        loops=loops,
        loops_counted_once=loops_counted_once,
        custom_calls=dict(custom_calls),
        launches=launches,
    )


@dataclass(frozen=True)
class _Step:
    """An instruction that runs, how often, and the types of its operands."""

    instruction: Instruction
    times: int
    operands: tuple[Arrays, ...]


def _steps(program: Program, computation: str, times: int) -> Iterator[_Step]:
    """Whatever moves bytes, in loops and calls too; a loop itself comes before its body."""
    instructions = program.computations[computation].instructions
    for instruction in instructions.values():
        opcode = instruction.opcode
        if opcode in _MOVES_NOTHING or opcode == _NOT_LOOKED_INTO or opcode.endswith("-done"):
            continue
        if opcode == "call":
            yield from _steps(program, instruction.called("to_apply"), times)
            continue
        yield _Step(instruction, times, tuple(instructions[name].result for name in instruction.operands))
        if opcode == "while":
            yield from _steps(program, instruction.called("body"), times * (_known_trips(instruction) or 1))


def _known_trips(loop: Instruction) -> int | None:
    trips = loop.attribute(r"known_trip_count[^0-9]*(\d+)")
    return int(trips) if trips else None


def _collective_kind(instruction: Instruction, program: Program) -> str | None:
    """The collective that an instruction is, starts, or has in its fusion."""
    if instruction.opcode == "fusion":
        parts = [part.opcode.removesuffix("-start") for part in program.called_by(instruction).instructions.values()]
        kind = next((opcode for opcode in reversed(parts) if opcode in COLLECTIVES), None)
        # So XLA:TPU writes a reduce-scatter: an all-reduce of which every device keeps its slice.
        return "reduce-scatter" if kind == "all-reduce" and "dynamic-slice" in parts else kind
    started = opcode_started(instruction, program)
    return started if started in COLLECTIVES else None


def _payload(kind: str, step: _Step) -> int:
    result = step.instruction.result
    if kind != "all-gather":
        return sum(size(operand) for operand in step.operands)
    if step.instruction.opcode.endswith("-start"):  # its type lists the operand too
        return max(array.nbytes for array in result)
    return size(result)


def _look(step: _Step) -> tuple[str, str, str]:
    """Opcode, shapes and origin: what a person would call the same. Numbers in the origin are those of layers."""
    instruction = step.instruction
    opcode = instruction.opcode
    if opcode == "fusion":
        opcode += ":" + (instruction.attribute(r"kind=(\w+)") or "")
    operands = [array for operand in step.operands for array in operand[:1]]
    shapes = f"({_largest(operands)}) -> {_largest(instruction.result)}"
    return opcode, shapes, re.sub(r"\d+", "#", instruction.op_name)


def _largest(arrays: Iterable[Array], limit: int = 4) -> str:
    """The largest arrays first: the weights, before a kernel's indices."""
    names = [str(array) for array in sorted(arrays, key=lambda array: -array.nbytes)]
    return ", ".join(names[:limit] + ["..."] * (len(names) > limit))


def _largest_first(rows: dict[tuple[str, str, str], Counter[str]]) -> tuple[Row, ...]:
    found = [Row(sums["bytes"], opcode, sums["count"], shapes, op_name) for (opcode, shapes, op_name), sums in rows.items()]
    return tuple(sorted((row for row in found if row.bytes), key=lambda row: -row.bytes))
