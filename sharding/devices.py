"""The devices that jax has and the memory that is free on them; what is wrong with either is one line."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import jax

from maverick_jax.errors import UserError, first_line

GIB = 2**30


def all_devices() -> list[jax.Device]:
    """`jax.devices()`.

    Raises:
      UserError: jax cannot start the platform that it is told to.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # without its plug-in jax asserts that there is one, and says nothing
        platforms = jax.config.values["jax_platforms"]
        why = first_line(error) if str(error) else "jax has no plug-in for it"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: jax cannot start it ({why}). Unset it, and `maverick check` says what this machine lacks."
        ) from error


def local_devices() -> list[jax.Device]:
    """Those of this process.

    Raises:
      UserError: as above.
    """
    return [device for device in all_devices() if device.process_index == jax.process_index()]


def free_bytes(here: Iterable[jax.Device]) -> int:
    """Of each of these devices of this process: as many as the fullest has, or a share of this machine's memory."""
    known = [stats for device in here if (stats := device.memory_stats()) and "bytes_limit" in stats]
    if known:
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in known)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def check_room(arrays: Sequence[jax.ShapeDtypeStruct], name: str) -> None:
    """Whether devices of this process have room for their parts of arrays that are still to come.

    Raises:
      UserError: they have not.
    """
    here = sorted({d for array in arrays for d in array.sharding.addressable_devices}, key=lambda d: d.id)
    needed = sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)
    free = free_bytes(here)
    if needed > free:
        raise UserError(
            f"{name}: its weights take {needed / GIB:,.1f} GiB of each device, and {free / GIB:,.1f} are free ({here[0].device_kind}). "
            "Divide them by a mesh, such as --mesh expert=8, or make narrower ones by `maverick convert --format`; `maverick plan` says "
            "what fits. Of a GPU jax takes 75 % unless XLA_CLIENT_MEM_FRACTION says more."
        )
