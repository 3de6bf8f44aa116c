"""Which dispatcher a mesh and a layout call for, and those that can be asked for by name."""

from __future__ import annotations

from collections.abc import Hashable

from jax.sharding import Mesh

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.sharding.all_to_all import AllToAll
from maverick_jax.sharding.dispatch import Dispatcher, Local
from maverick_jax.sharding.layout import Layout, check_placed
from maverick_jax.sharding.ragged import Ragged

ROUNDS = 2  # each with room for twice an even share: nothing is dropped before a device is sent four times its share
DISPATCHERS = {"local": Local, "all_to_all": AllToAll, "ragged": Ragged}


def make_dispatcher(mesh: Mesh | None, layout: Layout, dispatcher: str | Dispatcher | None = None, *, training: bool = False) -> Dispatcher:
    """The dispatcher for a mesh.

    Args:
      dispatcher: one of your own, a name of `DISPATCHERS`, or None: `AllToAll` where the layout divides the experts over
        several devices, else `Local`.
      training: of those, one that gradients pass: it sends in `ROUNDS` rounds and reports what it drops.

    Raises:
      UserError: no mesh, none of these, or one that was made for another mesh.
    """
    if mesh is not None:
        check_placed(mesh, layout)
    if callable(dispatcher) and not isinstance(dispatcher, type):
        if getattr(dispatcher, "mesh", None) not in (None, mesh):
            raise UserError("the dispatcher was made for another mesh than the model's: give both the same.")
        if not isinstance(dispatcher, Hashable):  # compiled programs are told apart by it
            raise UserError(f"dispatcher {show(dispatcher)} cannot be hashed: make its class a frozen dataclass, or leave out __eq__.")
        return dispatcher
    if dispatcher is not None and (not isinstance(dispatcher, str) or dispatcher not in DISPATCHERS):
        raise UserError(f"dispatcher {dispatcher!r} is unknown: choose one of {', '.join(DISPATCHERS)}, or pass one that is made.")
    if mesh is None or mesh.size == 1:
        return Local()
    divided = any(mesh.shape[axis] > 1 for axis in layout.mesh_axes("expert"))
    chosen = dispatcher or ("all_to_all" if divided else "local")
    return DISPATCHERS[chosen](mesh, layout, **({"rounds": ROUNDS} if training and chosen != "local" else {}))
