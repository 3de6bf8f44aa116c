"""The pickle in a file of `torch.save`, understood without running it.

A pickle is a program that calls functions by their names. Here names stay names: those that make tensors are known and become a
description of the tensor, a few others are known to be harmless and become nothing, and any other is an error.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any, NamedTuple

MAX_OPERATIONS = 500_000  # 20,000 tensors
MAX_DEPTH = 100  # of values in values that are not complete; a dict of tensors takes four
DTYPE = re.compile(r"torch\.(b?float|complex|u?int|qu?int|bits|bool|half|double|long|short)\w*")
TYPED_STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage")
UNTYPED_STORAGE = re.compile(r"torch\.(storage\.)?_?UntypedStorage")
OF_TYPED_STORAGE = {  # where the storage does not have its dtype's name
    "BFloat16": "bfloat16",
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
}
TENSOR = {  # function -> where the dtype and what else the tensor has are among its arguments
    "torch._utils._rebuild_tensor": (None, None),
    "torch._utils._rebuild_tensor_v2": (None, 6),
    "torch._utils._rebuild_tensor_v3": (6, 7),
}
PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")  # of a tensor, their first argument
OF_TYPE = "torch._tensor._rebuild_from_type_v2"  # of another function and its arguments
DICT = "collections.OrderedDict"
HARMLESS = {  # what stands beside the tensors: buffers of bytes, sizes
    *("_io.BytesIO", "_codecs.encode", "builtins.bytes", "builtins.bytearray", "builtins.set", "builtins.complex", "collections.Counter"),
    *("torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter"),
}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUT, GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


class MoreThanTensorsError(ValueError):
    """The pickle would do something that loading tensors does not take."""


class Name(str):
    """Of a function, class or dtype."""


class Storage(NamedTuple):
    """The bytes of one or more tensors: `count` elements of a dtype, or bytes if it is None, in a record of the archive."""

    dtype: str | None
    record: Any
    count: Any


class Stored(NamedTuple):
    """A tensor: its elements in a storage. Nothing is known of the types and ranges of the last three."""

    storage: Storage
    dtype: str
    offset: Any
    size: Any
    stride: Any


class Other:
    """What is no tensor."""


def read_pickle(data: bytes) -> Any:
    """What was saved: dicts, lists, tuples and plain values as they are, tensors as `Stored`, all else as `Other`.

    Raises:
      MoreThanTensorsError: it names anything else, which was not run.
      ValueError, LookupError, TypeError, AttributeError: it is no such pickle.
    """
    machine = _Machine()
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_OPERATIONS:
            raise ValueError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
        if operation.name == "STOP":
            return machine.stack.pop()
        machine.do(operation.name, argument)
    raise AssertionError("genops ends with STOP, or raises")


class _Machine:
    """A stack, the stacks under its marks, and what is remembered by number.

    No operation makes more than its own bytes call for, and none looks into what lies deeper than one level: values that hold
    themselves, or hold others twice in each of a hundred levels, do no harm.
    """

    def __init__(self):
        self.stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memory: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in PUT:
            self._memory[argument] = stack[-1]
        elif name in GET:
            stack.append(self._memory[argument])
        elif name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(_last(stack, TUPLES[name]))]
        else:
            self._do_rare(name, argument)

    def _do_rare(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO":
                pass
            case "MARK" if len(self._marked) < MAX_DEPTH:
                self._marked.append(stack)
                self.stack = []
            case "TUPLE":
                self._to_mark().append(tuple(stack))
            case "GLOBAL":
                stack.append(_check_name(Name(argument.replace(" ", ".").replace("__builtin__.", "builtins."))))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                stack.append({} if kind == DICT else Other())
            case "BUILD":
                stack.pop()  # what an object holds beside its items
            case "SETITEM":
                _set(stack[-3], _last(stack, 2))
                del stack[-2:]
            case "SETITEMS":
                _set(self._to_mark()[-1], stack)
            case "APPEND":
                _list(stack[-2]).append(stack.pop())
            case "APPENDS":
                _list(self._to_mark()[-1]).extend(stack)
            case "MARK":
                raise ValueError(f"a pickle of values more than {MAX_DEPTH} deep")
            case _:
                raise MoreThanTensorsError(f"operation {name}, which torch.save does not use")

    def _to_mark(self) -> list[Any]:
        """Back to the stack under the last mark."""
        self.stack = self._marked.pop()
        return self.stack


def _check_name(name: Name) -> Name:
    known = name in HARMLESS or name in TENSOR or name in PARAMETER or name in (DICT, OF_TYPE)
    if not known and not any(kind.fullmatch(name) for kind in (DTYPE, TYPED_STORAGE, UNTYPED_STORAGE)):
        raise MoreThanTensorsError(f"it asks for {name} by name")
    return name


def _call(function: Any, arguments: Any) -> Any:
    """What a function would make."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise TypeError("a call of what is no function")
    if function in TENSOR:
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without storage")
        dtype, more = (arguments[at] if at is not None and at < len(arguments) else None for at in TENSOR[function])
        if more:
            raise MoreThanTensorsError("a tensor with marks beside its values, as of a negated view")
        return Stored(storage, dtype or storage.dtype or "torch.uint8", offset, size, stride)
    if function in PARAMETER:
        return arguments[0]
    if function == OF_TYPE:
        return _call(arguments[0], arguments[2])
    return {} if function == DICT and not arguments else Other()


def _storage(identity: Any) -> Storage:
    kind, name, record, _, count = identity
    if kind != "storage" or not isinstance(name, Name):
        raise TypeError("a storage of no kind")
    if UNTYPED_STORAGE.fullmatch(name):
        return Storage(None, record, count)
    if not (found := TYPED_STORAGE.fullmatch(name)):
        raise TypeError(f"{name} as a storage")
    return Storage(f"torch.{OF_TYPED_STORAGE.get(found[1], found[1].lower())}", record, count)


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError("an entry of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):  # of a tuple of tuples the hash may take for ever
            raise TypeError("a key that is neither text nor number")
        target[key] = value


def _list(target: Any) -> list[Any]:
    if not isinstance(target, list):
        raise TypeError("an item of what is no list")
    return target


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("too few values")
    return stack[-count:]
