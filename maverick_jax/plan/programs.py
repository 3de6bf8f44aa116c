"""The programs of inference, described by shapes and shardings alone: what a compiler needs, without any weights.

Shape suffixes: B batch, T tokens, N tiles, S pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.cache import KVCache
from maverick_jax.plan.weights import DTYPES, abstract_model
from maverick_jax.sharding import AttendOnMesh, Constrain, Dispatcher, Layout, make_dispatcher
from maverick_jax.sharding.attend import CACHE

TILES = 16  # of the largest picture, without its global tile: a vision program's rows


@dataclasses.dataclass(frozen=True)
class Program:
    """`jax.jit(function, static_argnums=0, donate_argnums=donated).lower(*arguments)` is the program."""

    name: str
    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        return jax.jit(self.function, static_argnums=0, donate_argnums=self.donated).lower(*self.arguments)


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
        """One token of every row, over a cache for `context` tokens: the new cache and the likeliest next tokens."""

        def step(graphdef, weights, cache, token_B):
            model = nnx.merge(graphdef, weights)
            x_B1D, cache, _ = model.hidden(model.embed(token_B[:, None]), None, cache)
            return cache, jnp.argmax(model.logits(x_B1D[:, 0]), axis=-1).astype(jnp.int32)

        token_B = self._array((batch,), jnp.int32, ("batch",))
        return Program("decode", step, (*self._model(vision=False), self._cache(batch, context, fresh=False), token_B), (2,))

    def prefill(self, batch: int, tokens: int, context: int | None = None) -> Program:
        """The first `tokens` of every row into an empty cache: the cache and the likeliest next tokens."""

        def step(graphdef, weights, cache, ids_BT, lengths_B):
            model = nnx.merge(graphdef, weights)
            x_B1D, cache, _ = model.hidden(model.embed(ids_BT), lengths_B, cache, last_only=True)
            return cache, jnp.argmax(model.logits(x_B1D[:, 0]), axis=-1).astype(jnp.int32)

        ids_BT = self._array((batch, tokens), jnp.int32, ("batch", "sequence"))
        lengths_B = self._array((batch,), jnp.int32, ("batch",))
        cache = self._cache(batch, context or tokens, fresh=True)
        return Program("prefill", step, (*self._model(vision=False), cache, ids_BT, lengths_B), (2,))

    def vision(self, tiles: int = TILES) -> Program:
        """Tiles to image features."""
        if self.config.vision is None:
            raise UserError("this model has no vision tower.")
        side = self.config.vision.image_size
        tiles_N3SS = self._array((tiles, self.config.vision.num_channels, side, side), jnp.float32, ("tiles", None, None, None))

        def encode(graphdef, weights, tiles_N3SS):
            return nnx.merge(graphdef, weights).encode_tiles(tiles_N3SS)

        return Program("vision", encode, (*self._model(vision=True), tiles_N3SS))

    def _model(self, *, vision: bool) -> tuple[nnx.GraphDef, Any]:
        """Graph and weights; of the two towers only the one that the program reads."""
        config = self.config if vision else dataclasses.replace(self.config, vision=None)
        options = {
            "dispatcher": make_dispatcher(self.mesh, self.layout, self.dispatcher),
            "attend": AttendOnMesh(self.mesh, self.layout),
            "constrain": Constrain(self.mesh, self.layout),
        }
        graphdef, weights = nnx.split(abstract_model(config, self.dtype, **options))
        for _, leaf in nnx.to_flat_state(weights):
            leaf.set_value(self._array(leaf.shape, leaf.dtype, leaf.get_metadata()["axes"]))
        return graphdef, weights

    def _cache(self, batch: int, context: int, *, fresh: bool) -> KVCache:
        cache = jax.eval_shape(lambda: KVCache.create(self.config.text, batch, context, DTYPES[self.dtype]))
        cache = dataclasses.replace(cache, layers=tuple(dataclasses.replace(layer, fresh=fresh) for layer in cache.layers))
        whole = NamedSharding(self.mesh, PartitionSpec())

        def place(buffer):
            sharding = self.layout.sharding(CACHE, buffer.shape, self.mesh) if buffer.ndim == len(CACHE) else whole
            return jax.ShapeDtypeStruct(buffer.shape, buffer.dtype, sharding=sharding)

        return jax.tree.map(place, cache)

    def _array(self, shape, dtype, axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.sharding(axes, shape, self.mesh))
