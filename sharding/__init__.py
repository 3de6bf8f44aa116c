"""Where things live on many devices: the mesh, the layout table, and the dispatchers that move tokens to experts."""

from maverick_jax.sharding.all_to_all import AllToAll
from maverick_jax.sharding.attend import Attend, AttendHere, AttendOnMesh
from maverick_jax.sharding.choice import DISPATCHERS, make_dispatcher
from maverick_jax.sharding.dispatch import Dispatcher, Local, Stats
from maverick_jax.sharding.layout import LATENCY, LAYOUTS, THROUGHPUT, TRAINING, Constrain, Layout, check_mesh, get_layout
from maverick_jax.sharding.mesh import AXES, make_mesh, parse_mesh
from maverick_jax.sharding.ragged import Ragged

__all__ = [
    "AXES",
    "DISPATCHERS",
    "LATENCY",
    "LAYOUTS",
    "THROUGHPUT",
    "TRAINING",
    "AllToAll",
    "Attend",
    "AttendHere",
    "AttendOnMesh",
    "Constrain",
    "Dispatcher",
    "Layout",
    "Local",
    "Ragged",
    "Stats",
    "check_mesh",
    "get_layout",
    "make_dispatcher",
    "make_mesh",
    "parse_mesh",
]
