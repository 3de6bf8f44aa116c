"""The device mesh: axes `data`, `expert` and `tensor`."""

import contextlib
import math
import os

import jax
from jax.sharding import AxisType, Mesh

from maverick_jax.errors import UserError

AXES = ("data", "expert", "tensor")
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
MOST_SIMULATED = 128  # one per expert of Maverick; 128 ran on two cores, with 1,000 the process aborts inside XLA:CPU


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A `jax.sharding.Mesh` over data * expert * tensor devices, with automatic axes.

    On a machine with only a CPU the devices are simulated: called before jax has started its backend, this asks for as
    many as the product needs.

    Raises:
      UserError: an axis below 1, or more devices than there are.
    """
    sizes = {"data": data, "expert": expert, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1:
            raise UserError(f"mesh axis {axis} is {size}: every axis needs at least one device.")
    wanted = math.prod(sizes.values())
    request_cpu_devices(wanted)
    available = jax.device_count()
    if wanted > available:
        shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        cure = ""
        if jax.default_backend() == "cpu":
            set_flag = f"; set XLA_FLAGS={DEVICE_COUNT_FLAG}={wanted} before starting Python"
            cure = set_flag if wanted <= MOST_SIMULATED else f"; a CPU simulates at most {MOST_SIMULATED}"
        raise UserError(f"the mesh {shape} needs {wanted} devices, there are {available}{cure}.")
    # Explicit axes, jax's default, break shard_map on inputs that carry no sharding.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:wanted])


def request_cpu_devices(count: int) -> None:
    """Ask for `count` simulated CPU devices, unless they are too many, somebody asked before or jax's backend has started."""
    if 1 < count <= MOST_SIMULATED and DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", "") and jax.config.jax_num_cpu_devices < count:
        with contextlib.suppress(RuntimeError):  # the backend runs already: make_mesh says what that means
            jax.config.update("jax_num_cpu_devices", count)


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=1,expert=8"` -> `{"data": 1, "expert": 8}`.

    Raises:
      UserError: another axis, or a size that is no positive number.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1 or axis in sizes:
            raise UserError(f"--mesh {text!r}: {part!r} is not AXIS=SIZE with AXIS one of {', '.join(AXES)}, each at most once.")
        sizes[axis] = int(size)
    return sizes
