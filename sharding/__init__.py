"""Where things live on many devices: the mesh, the layout table, and the dispatchers that move tokens to experts."""

from maverick_jax.sharding.all_to_all import AllToAll
from maverick_jax.sharding.dispatch import Dispatcher, Local, Stats
from maverick_jax.sharding.layout import THROUGHPUT, Constrain, Layout, get_layout
from maverick_jax.sharding.mesh import make_mesh, parse_mesh

__all__ = ["THROUGHPUT", "AllToAll", "Constrain", "Dispatcher", "Layout", "Local", "Stats", "get_layout", "make_mesh", "parse_mesh"]
