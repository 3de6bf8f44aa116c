"""The device mesh: axes `data`, `expert` and `tensor`, on one host or many."""

import contextlib
import math
import operator
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.sharding import multihost
from maverick_jax.sharding.devices import all_devices

AXES = ("data", "expert", "tensor")
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
MOST_SIMULATED = 128  # one per expert of Maverick; 128 ran on two cores, with 1,000 the process aborts inside XLA:CPU


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A `jax.sharding.Mesh` over data * expert * tensor devices, with automatic axes.

    On a machine with only a CPU the devices are simulated: called before jax has started its backend, this asks for as
    many as the product needs. In a run of several processes each gives an equal share of its devices; `tensor` and then
    `expert` stay inside a host or slice as far as they fit, `data` goes across.

    Raises:
      UserError: an axis that is no whole number from 1, more devices than there are, or a number that the processes or slices
        cannot share evenly.
    """
    sizes = {"data": data, "expert": expert, "tensor": tensor}
    for axis, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__") or operator.index(size) < 1:
            raise UserError(f"mesh axis {axis} is {show(size)}: it must be a whole number of devices, at least 1.")
        sizes[axis] = operator.index(size)
    wanted = math.prod(sizes.values())
    request_cpu_devices(wanted)
    available = len(all_devices())
    shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if wanted > available:
        cure = ""
        if jax.default_backend() == "cpu":
            each = -(-wanted // jax.process_count())
            set_flag = f"; set XLA_FLAGS={DEVICE_COUNT_FLAG}={each} before starting Python"
            cure = set_flag if each <= MOST_SIMULATED else f"; a CPU simulates at most {MOST_SIMULATED}"
        raise UserError(f"the mesh {shape} needs {wanted} devices, there are {available}{cure}.")
    if wanted % jax.process_count():
        raise UserError(f"the mesh {shape} has {wanted} devices, which {jax.process_count()} processes cannot share evenly.")
    return arrange(_share(wanted), tuple(sizes.values()), shape)


def _share(wanted: int) -> list[jax.Device]:
    """So many devices, as many from each process."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in all_devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for process in sorted(by_process) for device in by_process[process][: wanted // len(by_process)]]


def arrange(devices: Sequence[jax.Device], sizes: tuple[int, ...], shape: str) -> Mesh:
    """A mesh over all these devices, axes laid along the wires where the hardware has any; `shape` names it in an error.

    A slice is what a fast network joins: jax numbers TPU slices, and elsewhere hosts or their NVLink domains.

    Among processes of one slice the devices keep the processes' order: `tensor` and `expert`, the last axes, stay together.
    """
    automatic = (AxisType.Auto,) * len(AXES)  # explicit axes, jax's default, break shard_map on inputs that carry no sharding
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # An axis of eight on a slice of 4 x 4 x 4 takes half of a physical axis, which jax.make_mesh refuses.
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(laid, AXES, axis_types=automatic)
    inside, across = divide_axes(sizes, slices)
    if math.prod(across) != slices:
        raise UserError(f"the mesh {shape} cannot be laid over {slices} slices: make data, or else expert, a multiple of {slices}.")
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES, axis_types=automatic)


def divide_axes(sizes: Sequence[int], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much of each axis lies inside a slice, and how much across: the first axes across, as far as they can be cut."""
    across = []
    for size in sizes:
        across.append(math.gcd(size, slices // math.prod(across)))
    return tuple(size // part for size, part in zip(sizes, across, strict=True)), tuple(across)


def request_cpu_devices(count: int) -> None:
    """Ask for `count` simulated CPU devices in all processes together, unless they are too many, somebody asked before or
    jax's backend has started."""
    each = -(-count // multihost.process_count())
    if 1 < each <= MOST_SIMULATED and DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", "") and jax.config.jax_num_cpu_devices < each:
        with contextlib.suppress(RuntimeError):  # the backend runs already: make_mesh says what that means
            jax.config.update("jax_num_cpu_devices", each)


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=1,expert=8"` -> `{"data": 1, "expert": 8}`.

    Raises:
      UserError: another axis, or a size that is no positive number.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch("0*[1-9][0-9]{0,8}", size) or axis in sizes:
            raise UserError(f"--mesh {text!r}: {part!r} is not AXIS=SIZE with AXIS one of {', '.join(AXES)}, each at most once.")
        sizes[axis] = int(size)
    return sizes
