"""What the devices of a mesh exchange: does it arrive where it should, and how fast.

Shape suffixes: N devices, M bytes for each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maverick_jax.bench.machine import quickest
from maverick_jax.sharding.wire import all_to_all

FLOATS = {"cpu": 2**18}  # that a device gives
FLOATS_ELSEWHERE = 2**24


class Exchange(NamedTuple):
    """One way to exchange.

    Attributes:
      sent: bytes that leave a device.
      right: whether every device of this process has what the others sent it.
    """

    name: str
    seconds: float
    sent: float
    right: bool


def exchanges(mesh: Mesh) -> list[Exchange]:
    """All-to-all, by which tokens reach their experts, and all-reduce, among all devices; nothing where there is one."""
    N, axes = mesh.size, mesh.axis_names
    if N == 1:
        return []
    each = FLOATS.get(mesh.devices.flat[0].platform, FLOATS_ELSEWHERE) // N
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    # From device s to device r travels s * N + r.
    numbers = np.arange(N * N, dtype=np.float32).reshape(N * N, 1)
    x = jax.make_array_from_callback((N * N, each), sharding, lambda index: numbers[index].repeat(each, axis=1))

    def on_all(function):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(axes), out_specs=PartitionSpec(axes), check_vma=False))

    transposed = numbers.reshape(N, N).T.reshape(N * N, 1)
    sums = np.tile(numbers.reshape(N, N).sum(axis=0), N)[:, None]
    found = []
    for name, function, expected, share in (
        ("all-to-all", lambda x: all_to_all(x, axes), transposed, (N - 1) / N),
        ("all-reduce", lambda x: lax.psum(x, axes), sums, 2 * (N - 1) / N),
    ):
        exchange = on_all(function)
        seconds = quickest(exchange, x)
        arrived = exchange(x).addressable_shards
        right = all(np.array_equal(part.data, expected[part.index[0]].repeat(each, axis=1)) for part in arrived)
        found.append(Exchange(name, seconds, share * N * each * x.dtype.itemsize, right))
    return found
