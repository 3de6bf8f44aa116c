"""The text of a compiled program as computations of instructions: what each one produces, takes and calls.

The text is what `compiled.as_text()` prints for TPU, GPU and CPU. Only what counting needs is kept.
"""

import math
import re
from dataclasses import dataclass

from maverick_jax.errors import UserError

HBM = 0  # other memory spaces lie on the chip (1 is a TPU's vector memory) or hold flags

_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n.*?\n\}", re.DOTALL)  # lines of its own within an instruction
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type; a tuple type has several."""

    type: str
    nbytes: int
    memory_space: int = HBM

    @property
    def in_hbm(self) -> bool:
        return self.memory_space == HBM

    def __str__(self) -> str:
        return self.type if self.in_hbm else f"{self.type}S({self.memory_space})"


Arrays = tuple[Array, ...]


def size(arrays: Arrays) -> int:
    """Bytes in every memory."""
    return sum(array.nbytes for array in arrays)


def hbm_size(arrays: Arrays) -> int:
    """Bytes in HBM."""
    return sum(array.nbytes for array in arrays if array.in_hbm)


@dataclass(frozen=True)
class Instruction:
    """`name = result opcode(operands), attributes`."""

    name: str
    opcode: str
    result: Arrays
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def parameter_number(self) -> int | None:
        return int(self.arguments) if self.opcode == "parameter" else None

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, as JAX noted it."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """First group of the first match of a pattern in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def called(self, role: str = "calls") -> str:
        """Name of the computation that it calls in this role: `calls`, `body`, `to_apply`."""
        name = self.attribute(rf"\b{role}=%?([\w.\-]+)")
        assert name, f"{self.opcode} {self.name} has no {role}"
        return name


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text: operands come before their users."""

    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.instructions.values() if i.parameter_number == number)


@dataclass(frozen=True)
class Program:
    """Computations by name; execution starts at `entry`."""

    computations: dict[str, Computation]
    entry: str

    def called_by(self, instruction: Instruction, role: str = "calls") -> Computation:
        return self.computations[instruction.called(role)]


def parse_program(hlo_text: str) -> Program:
    """Computations of a compiled program.

    Raises:
      UserError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _KERNEL_METADATA.sub("", hlo_text).splitlines():
        header = _HEADER.match(line)
        if header and not line[0].isspace():
            current = computations[header[2]] = Computation({})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _parse_instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise UserError(f"this is no compiled program: no ENTRY in {len(hlo_text)} characters; pass what `compiled.as_text()` returns.")
    return Program(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    text = match[3]
    end_of_type = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, end_of_type)
    if not opcode:
        return None
    end = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : end]
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        result=_parse_arrays(text[:end_of_type]),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=text[end + 1 :],
        is_root=bool(match[1]),
    )


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.finditer(r"[()]", text[start:]):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return start + parenthesis.start()
    return len(text)


def _parse_arrays(type_text: str) -> Arrays:
    """Arrays of a type, a nested tuple's too: `(f32[2,3]{1,0:T(8,128)S(1)}, (s32[]))`."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(type_text):
        elements = math.prod(int(dim) for dim in dims.split(",") if dim)
        space = _MEMORY_SPACE.search(layout)
        arrays.append(Array(f"{dtype}[{dims}]", math.ceil(elements * _bits(dtype) / 8), int(space[1]) if space else HBM))
    return tuple(arrays)


def _bits(dtype: str) -> int:
    """Size of one element, from the name: bf16, s4, f8e4m3fn. A token or a handle has none."""
    if dtype == "pred":
        return 8
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0
