"""What a compiled program makes outside its fusions: every array that is written to memory."""

from typing import Any, NamedTuple

from maverick_jax.plan.hlo_text import parse_program

# Hand an array on, or run computations that are looked at themselves.
PASSES = ("parameter", "get-tuple-element", "tuple", "while", "conditional", "call", "bitcast")


class Made(NamedTuple):
    """`dtype[shape]`, made by an operation (of a fusion: its last), in the entry or in a computation that it runs."""

    dtype: str
    shape: tuple[int, ...]
    by: str
    in_loop: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)


def arrays_made(compiled: Any) -> list[Made]:
    """Every array that a compiled program (`jit(f).lower(…).compile()`) writes, but for what happens within a fusion."""
    program = parse_program(compiled.as_text())
    instructions = {name: computation.instructions.values() for name, computation in program.computations.items()}
    fused = {i.called() for of in instructions.values() for i in of if i.opcode == "fusion"}
    made = []
    for name in instructions.keys() - fused:
        for i in instructions[name]:
            if i.opcode in PASSES:
                continue
            by = program.called_by(i).root.opcode if i.opcode == "fusion" else i.opcode
            for array in i.result:
                dtype, _, dims = array.type.rstrip("]").partition("[")
                made.append(Made(dtype, tuple(int(dim) for dim in dims.split(",") if dim), by, name != program.entry))
    return made
