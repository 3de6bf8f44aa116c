"""How many requests an engine serves at once, and with how much cache: what the devices have memory for."""

from __future__ import annotations

import dataclasses
import math

import jax

from maverick_jax.errors import UserError
from maverick_jax.inference.cache import ROOM, make_pages
from maverick_jax.inference.steps import Geometry
from maverick_jax.model import Llama4
from maverick_jax.ops.pages import held
from maverick_jax.sharding import devices, multihost
from maverick_jax.sharding.attend import PAGES

SLOTS = (64, 32, 16, 8, 4, 2, 1)
SHORTEST = 2048  # tokens
SHARE = 0.8  # of the free memory; the rest is for what programs need while they run
HOST_SHARE = 0.25  # of a machine's memory, where the devices are its processors


@dataclasses.dataclass(frozen=True)
class Room:
    """An engine's cache.

    Attributes:
      dtype: of keys and values.
      bytes: of one device.
    """

    geometry: Geometry
    dtype: str
    bytes: int

    def __str__(self) -> str:
        g = self.geometry
        return f"{g.places} slots of up to {g.max_length:,} tokens, {g.pages} pages of {g.page}, {self.bytes / 2**20:,.1f} MiB per device"


def room_for(
    model: Llama4,
    *,
    slots: int | None = None,
    max_length: int | None = None,
    pages: int | None = None,
    eight_bits: bool = False,
    routed: bool = False,
) -> Room:
    """Room as asked for, or as much as fits: first one request of full length, then slots, then pages for all of them.

    `routed` goes into its geometry.

    Raises:
      UserError: a number out of its range, a length beyond the context, more than the devices have free, or experts that there are not.
    """
    text = model.config.text
    if routed and not text.moe_layers:
        raise UserError("routed_experts=True (--routed-experts) is asked for, but the model has no layers with experts.")
    slots, max_length, pages = (
        None if value is None else ROOM.check(name, value)
        for name, value in (("slots", slots), ("max_length", max_length), ("pages", pages))
    )
    if max_length is not None and max_length > text.max_position_embeddings:
        raise UserError(f"max_length is {max_length}, but the model's context holds {text.max_position_embeddings} tokens.")
    there = free_bytes(model)
    free = int(there * (HOST_SHARE if platform_of(model) == "cpu" else SHARE))
    length = max_length or text.max_position_embeddings
    if max_length is None:
        while length > SHORTEST and _room(model, eight_bits, slots or 1, length, _row(model, length)).bytes > free:
            length = -(-length // 2)
    one = _row(model, length)
    if slots is None:
        slots = next((n for n in SLOTS if _room(model, eight_bits, n, length, pages or one).bytes <= free), 1)
    if pages is None:
        pages = slots * one
        while pages > one and _room(model, eight_bits, slots, length, pages).bytes > free:
            pages = max(one, pages * 3 // 4)
    room = _room(model, eight_bits, slots, length, pages)
    if room.bytes > there:
        raise UserError(
            f"{room} are asked for, but {there / 2**20:,.1f} MiB are free there: ask for fewer slots or pages, or a smaller max_length."
        )
    return dataclasses.replace(room, geometry=dataclasses.replace(room.geometry, routed=routed))


def _row(model: Llama4, max_length: int) -> int:
    """Pages of a request of full length."""
    return Geometry.of(model.config.text, 1, max_length).pages


def _room(model: Llama4, eight_bits: bool, slots: int, max_length: int, pages: int) -> Room:
    text, dtype = model.config.text, "int8" if eight_bits else held(model.text.embedding.dtype, cpu=platform_of(model) == "cpu").name
    geometry = Geometry.of(text, slots, max_length, pages)
    layers = jax.eval_shape(lambda: make_pages(text, slots, geometry.pages, max_length, geometry.page, dtype))
    return Room(geometry, dtype, sum(_local_bytes(model, x) for x in jax.tree.leaves(layers)))


def _local_bytes(model: Llama4, pages: jax.ShapeDtypeStruct) -> int:
    """Of one device."""
    mesh, layout = getattr(model.constrain, "mesh", None), getattr(model.constrain, "layout", None)
    ways = (
        1
        if mesh is None or layout is None
        else math.prod(mesh.shape[a] for axes in layout.split(PAGES[: pages.ndim], pages.shape, mesh) for a in axes)
    )
    return math.prod(pages.shape) * pages.dtype.itemsize // ways


def free_bytes(model: Llama4) -> int:
    """Bytes that are free on each device: as many as the fullest has, on whichever host, or processes would differ."""
    return min(multihost.exchange(devices.free_bytes(model.text.embedding[...].sharding.addressable_devices)))


def platform_of(model: Llama4) -> str:
    """Of the devices that hold a model."""
    sharding = model.text.embedding[...].sharding
    held = jax.devices() if sharding is None else sharding.device_set  # None: a model of shapes alone
    return next(iter(held)).platform
