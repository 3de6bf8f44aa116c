"""The programs of inference, described by shapes and shardings alone: what a compiler needs, without any weights.

Shape suffixes: B batch, T tokens, N tiles, S pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference import steps
from maverick_jax.inference.sizes import decode_rows
from maverick_jax.model.compiled import Structure, take_apart
from maverick_jax.model.llama4 import identity
from maverick_jax.model.text import RESIDUAL
from maverick_jax.plan.weights import DTYPES, abstract_model
from maverick_jax.sharding import AttendOnMesh, Constrain, Dispatcher, Layout, make_dispatcher
from maverick_jax.sharding.attend import PAGES

TILES = 16  # of the largest picture, without its global tile: a vision program's rows


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the engine's programs (`inference/steps.py`) and what it is called with."""

    name: str
    function: Any
    arguments: tuple

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Decode, prefill and vision of a model on a mesh, which may consist of devices that are not there.

    Attributes:
      dtype: one of `weights.DTYPES`.
      dispatcher: as for `load`.
    """

    config: Config
    mesh: Mesh
    layout: Layout
    dtype: str = "bfloat16"
    dispatcher: str | Dispatcher | None = None

    def decode(self, batch: int, context: int) -> Program:
        """One token of every row, over a cache for `context` tokens each: the new cache and the next tokens' logits."""
        structure, leaves = self._model(vision=False)
        geometry, state, table_SJ = self._cache(batch, context)
        rows = decode_rows(batch, self.mesh.devices.flat[0].platform)[-1]
        token_S, draft_BD, rows_BC = (self._whole(shape) for shape in ((batch,), (rows, 0), (rows, len(steps.Call._fields))))
        return Program("decode", steps.decode, (structure, geometry, leaves, state, table_SJ, token_S, draft_BD, rows_BC))

    def prefill(self, batch: int, tokens: int, context: int | None = None, *, first: bool = True) -> Program:
        """The next `tokens` of every row, its first ones or later ones: the cache and the next tokens' logits."""
        structure, leaves = self._model(vision=False)
        geometry, state, table_SJ = self._cache(batch, context or tokens)
        x_BTD = self._array((batch, tokens, self.config.text.hidden_size), jnp.dtype(DTYPES[self.dtype]), RESIDUAL)
        rows_BC = self._whole((batch, len(steps.Call._fields)))
        return Program("prefill", steps.prefill, (structure, geometry, first, leaves, state, table_SJ, x_BTD, rows_BC))

    def vision(self, tiles: int = TILES) -> Program:
        """Tiles to image features."""
        if self.config.vision is None:
            raise UserError("this model has no vision tower.")
        side = self.config.vision.image_size
        tiles_N3SS = self._array((tiles, self.config.vision.num_channels, side, side), jnp.float32, ("tiles", None, None, None))

        return Program("vision", steps.encode, (*self._model(vision=True), tiles_N3SS))

    def _model(self, *, vision: bool) -> tuple[Structure, list[Any]]:
        """Structure and leaves; of the two towers only the one that the program reads."""
        config = self.config if vision else dataclasses.replace(self.config, vision=None)
        options = {
            "dispatcher": make_dispatcher(self.mesh, self.layout, self.dispatcher),
            "attend": AttendOnMesh(self.mesh, self.layout),
            "constrain": Constrain(self.mesh, self.layout),
        }
        model = abstract_model(config, self.dtype, **options)
        for _, leaf in nnx.to_flat_state(nnx.state(model)):
            leaf.set_value(self._array(leaf.shape, leaf.dtype, leaf.get_metadata()["axes"]))
        return take_apart(model)

    def _cache(self, batch: int, context: int) -> tuple[steps.Geometry, steps.State, Any]:
        """An engine's, with pages for `batch` rows of full length."""
        geometry = steps.Geometry.of(self.config.text, batch, context)
        state, _ = jax.eval_shape(lambda: steps.create(self.config.text, geometry, DTYPES[self.dtype], identity))

        def place(x):
            return self._array(x.shape, x.dtype, PAGES) if x.ndim == len(PAGES) else self._whole(x.shape)

        return geometry, jax.tree.map(place, state), self._whole((batch, geometry.stretches))

    def _whole(self, shape) -> jax.ShapeDtypeStruct:
        """Whole numbers, the same on every device."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def _array(self, shape, dtype, axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.sharding(axes, shape, self.mesh))
