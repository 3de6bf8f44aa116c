"""HBM bytes that one run of one instruction reads and writes. The rule stands in `plan/hlo.py`."""

import re

from maverick_jax.plan.hlo_text import Arrays, Computation, Instruction, Program, hbm_size, size

_RENAMES = ("bitcast", "reshape")
_SLICES = ("dynamic-slice", "gather", "slice")
_UPDATE_OPERAND = {"dynamic-update-slice": 1, "scatter": 2}  # both update their operand 0 in place
_FLAG_BYTES = 64  # indices and flags beside the slice in the type of an asynchronous start are no larger


def bytes_moved(instruction: Instruction, operands: tuple[Arrays, ...], program: Program) -> tuple[int, int]:
    """HBM bytes read and written.

    Args:
      instruction: neither a loop nor a call: these move nothing themselves.
      operands: the type of each of its operands.
      program: has the computations of its fusions.
    """
    read = sum(_read(instruction, position, operand, program) for position, operand in enumerate(operands))
    written = _written(instruction, operands, program)
    in_place = _updated_by_custom_call(instruction, operands)
    return read - in_place, written - (in_place if hbm_size(instruction.result) else 0)


def opcode_started(instruction: Instruction, program: Program) -> str:
    """Opcode of what runs, whether at once, as `all-gather-start`, or wrapped in an `async-start`."""
    if instruction.opcode == "async-start":
        return program.called_by(instruction).root.opcode
    return instruction.opcode.removesuffix("-start")


def _read(instruction: Instruction, position: int, operand: Arrays, program: Program) -> int:
    in_hbm = hbm_size(operand)
    if not in_hbm:
        return 0
    if instruction.opcode == "fusion":
        return min(in_hbm, _read_in_fusion(program.called_by(instruction), position, size(operand), program))
    if position == 0 and instruction.opcode in _SLICES:
        return size(instruction.result)
    if position == 0 and instruction.opcode in _UPDATE_OPERAND:
        return 0
    if _starts_slice(instruction, program):
        return min([in_hbm, *(array.nbytes for array in instruction.result if array.nbytes > _FLAG_BYTES)])
    return in_hbm


def _starts_slice(instruction: Instruction, program: Program) -> bool:
    wrapped = instruction.opcode == "async-start" and opcode_started(instruction, program) in ("dynamic-slice", "slice")
    return wrapped or instruction.opcode == "slice-start"


def _read_in_fusion(fused: Computation, position: int, whole: int, program: Program) -> int:
    """Bytes of one operand that a fusion looks at: all, unless every user takes a slice or updates it in place."""
    parameter = fused.parameter(position)
    names = {parameter.name}
    sliced = []
    for user in fused.instructions.values():
        if names.isdisjoint(user.operands):
            continue
        if user.opcode in _RENAMES:
            names.add(user.name)
        elif user.opcode == "fusion":
            inner = program.called_by(user)
            sliced += [_read_in_fusion(inner, at, whole, program) for at, name in enumerate(user.operands) if name in names]
        elif user.operands[0] in names and user.opcode in _SLICES:
            sliced.append(size(user.result))
        elif user.operands[0] in names and user.opcode in _UPDATE_OPERAND:
            sliced.append(0)
        else:
            return whole
    return min(sum(sliced), whole) if sliced else whole


def _written(instruction: Instruction, operands: tuple[Arrays, ...], program: Program) -> int:
    result = instruction.result
    if instruction.opcode.endswith("-start") and len(result) > 1:
        return _written_by_start(instruction)
    if not hbm_size(result):
        return 0
    update = None
    if instruction.opcode == "fusion":
        update = _written_in_place(instruction, program)
    elif instruction.opcode == "dynamic-update-slice":
        update = size(operands[1])
    return hbm_size(result) if update is None else update


def _written_by_start(start: Instruction) -> int:
    """The type of an asynchronous start lists what it takes, what it makes, and its flags."""
    if start.opcode == "copy-start":  # lists its destination first
        return hbm_size(start.result[:1])
    return size(start.result) // 2 if all(array.in_hbm for array in start.result) else 0


def _written_in_place(fusion: Instruction, program: Program) -> int | None:
    """HBM bytes written by a fusion that updates an operand in place, or that has several results; None for any other."""
    fused = program.called_by(fusion)
    if fused.root.opcode != "tuple":
        return _update_size(fused.root, fused, program)
    updates = [_update_size(fused.instructions[name], fused, program) for name in fused.root.operands]
    parts = zip(updates, fusion.result, strict=False)  # GPU fusions may have tuples among their results
    return sum(array.nbytes if update is None else update for update, array in parts if array.in_hbm)


def _update_size(made: Instruction, fused: Computation, program: Program) -> int | None:
    """Bytes of the update where this part of a fusion's result is an operand updated in place, else None."""
    while made.opcode in (*_RENAMES, "copy"):
        made = fused.instructions[made.operands[0]]
    if made.opcode == "fusion":
        return _written_in_place(made, program)
    if made.opcode in _UPDATE_OPERAND:
        return size(fused.instructions[made.operands[_UPDATE_OPERAND[made.opcode]]].result)
    return None


def _updated_by_custom_call(instruction: Instruction, operands: tuple[Arrays, ...]) -> int:
    """HBM bytes of operands whose memory is also a custom call's result: how much of them it touches, nobody says."""
    if instruction.opcode != "custom-call":
        return 0
    aliases = instruction.attribute(r"output_to_operand_aliasing=\{(.*?\))\}") or ""
    return sum(hbm_size(operands[int(position)]) for position in re.findall(r"\((\d+)", aliases))
