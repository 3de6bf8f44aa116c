"""The whole model: pictures and token ids in, logits out.

Shape suffixes: B batch, T tokens, N tiles, S pixels, D model width, V vocabulary, I image features of the call.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from maverick_jax.config import Config
from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.model import inputs
from maverick_jax.model.attention import Piece
from maverick_jax.model.compiled import compiled
from maverick_jax.model.inputs import Array, Lengths, Rows
from maverick_jax.model.parameter import float_dtype, weight
from maverick_jax.model.shown import SignatureOfInit, describe
from maverick_jax.model.text import RESIDUAL, Text
from maverick_jax.model.vision import Vision
from maverick_jax.ops.linear import linear
from maverick_jax.sharding.attend import Attend, AttendHere
from maverick_jax.sharding.dispatch import Dispatcher, Local, Stats

if TYPE_CHECKING:
    from maverick_jax.inference.cache import KVCache


def identity(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The constraint of a model that no mesh holds."""
    return x


class Llama4(nnx.Module):
    """Llama 4 Maverick, Scout, or any model with their architecture.

    `model(token_ids, tiles)` gives logits. Its steps, `encode_tiles`, `embed`, `hidden` and `logits`, are for functions of your
    own that you compile: outside `jit` they run operation by operation.

    Args:
      config: sizes and switches.
      dispatcher: moves tokens to their experts; `Local()` keeps them on one device.
      attend: how queries meet keys; `AttendHere()` on one device.
      constrain: `constrain(x, logical_axes)` pins an activation to a layout.
      dtype: of weights and activations; None takes the config's.
      rngs: for initial values. `get_abstract_model` describes a model without making any.

    Raises:
      UserError: an argument is none of these.
    """

    __signature__ = SignatureOfInit()

    def __init__(
        self,
        config: Config,
        *,
        dispatcher: Dispatcher | None = None,
        attend: Attend | None = None,
        constrain: Any = identity,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dispatcher, attend = Local() if dispatcher is None else dispatcher, AttendHere() if attend is None else attend
        _check_parts(config, dispatcher, attend, constrain, rngs)
        dtype = float_dtype(config.dtype if dtype is None else dtype)
        self.text = Text(config.text, dispatcher=dispatcher, attend=attend, constrain=constrain, dtype=dtype, rngs=rngs)
        if config.vision is not None:
            self.vision = Vision(config.vision, constrain=constrain, dtype=dtype, rngs=rngs)
            self.projector = weight(rngs, (config.vision.vision_output_dim, config.text.hidden_size), ("vision_output", "embed"), dtype)
        self.config = config
        self.constrain = constrain
        self.directory: str | None = None  # where it was loaded from: home of its tokenizer and chat template

    @overload
    def __call__(self, token_ids: Rows, tiles: Array | None = None, *, lengths: Lengths | None = None, cache: None = None) -> jax.Array: ...

    @overload
    def __call__(
        self, token_ids: Rows, tiles: Array | None = None, *, lengths: Lengths | None = None, cache: KVCache
    ) -> tuple[jax.Array, KVCache]: ...

    def __call__(self, token_ids: Rows, tiles: Array | None = None, *, lengths: Lengths | None = None, cache: KVCache | None = None) -> Any:
        """Logits of every token.

        Outside `jit` the call is compiled, once per shape of the inputs; the program serves other weights too. Within a function
        that jax transforms it becomes a part of that.

        Args:
          token_ids: [B, T] whole numbers, or a list of equally long lists.
          tiles: [N, 3, S, S] float32 in -1..1, the tiles of all pictures in the order of their `<|patch|>` tokens.
          lengths: [B] whole numbers, real tokens per row; what follows is padding. None: all T.
          cache: what earlier calls left; the tokens continue it. It can be continued once more, by others.

        Returns:
          [B, T, V] float32; with a cache a pair (logits, cache).

        Raises:
          UserError: shapes or dtypes are others; and, where values are known (outside jit), ids outside the vocabulary, tiles
            and `<|patch|>` tokens that disagree, a cache without room.
        """
        token_ids = inputs.token_ids_of(token_ids)
        B, T = token_ids.shape
        lengths = np.full(B, T, np.int32) if lengths is None else inputs.lengths_of(lengths, B, T)
        pictures = None if tiles is None else inputs.tiles_of(tiles, self.config.vision)
        real = np.arange(T, dtype=np.int32)[None, :] < lengths[:, None]
        inputs.check_vocabulary(token_ids, real, self.config.text.vocab_size)
        token_ids = token_ids.astype(jnp.int32)
        is_patch = (token_ids == self.config.image_token_index) & real  # what padding holds is nobody's
        inputs.check_patches(is_patch, pictures, self.config.vision)
        if cache is not None:
            inputs.check_cache(cache, self.config.text, lengths)
        logits, cache = self._forward(token_ids, is_patch, pictures, lengths, cache)
        return logits if cache is None else (logits, cache)

    @property
    def decoder(self) -> Llama4:
        """The same parameters without the vision tower: what programs take that see no picture."""
        if self.config.vision is None:
            return self
        decoder = copy.copy(self)
        del decoder.vision, decoder.projector
        decoder.config = dataclasses.replace(self.config, vision=None)
        return decoder

    def __repr__(self) -> str:
        """A line; `nnx.display(nnx.state(model))` shows every parameter."""
        return describe(self)

    __str__ = __repr__

    @compiled
    def _forward(
        self, token_ids: Array, is_patch: Array, pictures: Array | None, lengths: Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        features = None if pictures is None else self.encode_tiles(pictures)
        index = jnp.cumsum(is_patch.reshape(-1)).reshape(is_patch.shape) - 1
        x, cache, _ = self.hidden(self.embed(token_ids, features, index), lengths, cache)
        return self.logits(x), cache

    def encode_tiles(self, tiles_N3SS: Array) -> jax.Array:
        """[N, 3, S, S] -> [N * tokens_per_tile, D]: what takes the place of the `<|patch|>` tokens.

        Raises:
          UserError: a checkpoint without a vision tower, no tiles, or other arrays than theirs.
        """
        pixels = inputs.tiles_of(tiles_N3SS, self.config.vision)
        if pixels is None:
            raise UserError("there are no tiles to encode.")
        features = linear(self.vision(jnp.asarray(pixels)), self.projector[...])
        return features.reshape(-1, features.shape[-1])

    def embed(self, token_ids_BT: Array, features_ID: jax.Array | None = None, index_BT: Array | None = None) -> jax.Array:
        """[B, T, D] embeddings; at `<|patch|>` tokens the image feature that `index_BT` names."""
        x_BTD = look_up(self.text.embedding[...], token_ids_BT)
        if features_ID is not None:
            is_patch = token_ids_BT == self.config.image_token_index
            x_BTD = jnp.where(is_patch[..., None], features_ID[index_BT], x_BTD)
        return self.constrain(x_BTD, RESIDUAL)

    def hidden(
        self,
        x_BTD: jax.Array,
        lengths_B: Array | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        first: bool = False,
        within_chunk: bool = False,
        document_BT: Array | None = None,
        expert_BTM: Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, tuple[Stats, ...]]:
        """Embeddings through the decoder: [B, T, D] normed hidden states, the new cache, and stats per MoE layer.

        Args:
          last_only: only each row's last token comes out, [B, 1, D], and the last layer computes only that.
          first, within_chunk: what the caller knows of the piece, for a quicker program: the cache is empty; no row of the piece crosses
            a border of its attention chunks. If it is not so, the result is wrong.
          document_BT: int32, several documents per row, that do not see each other (-1: padding); instead of lengths and cache.
          expert_BTM: integers, the expert of each mixture that tokens go to, as an engine tells them; None: where the routers say.
        """
        B, T = x_BTD.shape[:2]
        lengths = jnp.full((B,), T, jnp.int32) if lengths_B is None else jnp.asarray(lengths_B, jnp.int32)
        start = jnp.zeros((B,), jnp.int32) if cache is None else cache.lengths_B
        if document_BT is None:
            piece = Piece.of(start, lengths, T, first=first or cache is None, within_chunk=within_chunk)
        else:
            piece = Piece.packed(jnp.asarray(document_BT))
        rows = None if cache is None else cache.rows()
        experts = None if expert_BTM is None else jnp.asarray(expert_BTM)
        x_BTD, rows, stats = self.text(x_BTD, piece, rows, last_only=last_only, expert_BTM=experts)
        return x_BTD, None if cache is None else cache.advanced(rows, piece.end_B), stats

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] normed hidden states -> [..., V] float32."""
        return self.text.logits(x)


def _check_parts(config: Any, dispatcher: Any, attend: Any, constrain: Any, rngs: Any) -> None:
    for name, value, holds, expected in (
        ("config", config, isinstance(config, Config), "a Config, such as Config.maverick()"),
        ("dispatcher", dispatcher, callable(dispatcher) and not isinstance(dispatcher, type), "a dispatcher, such as Local()"),
        ("attend", attend, hasattr(attend, "in_order") and not isinstance(attend, type), "AttendHere() or AttendOnMesh(mesh, layout)"),
        ("constrain", constrain, callable(constrain) and not isinstance(constrain, type), "a function, such as Constrain(mesh, layout)"),
        ("rngs", rngs, isinstance(rngs, nnx.Rngs | _SameKey), "an nnx.Rngs, such as nnx.Rngs(0)"),
    ):
        if not holds:
            raise UserError(f"{name} is {show(value)}: it must be {expected}.")


def look_up(table_VD: jax.Array, ids_BT: Array) -> jax.Array:
    """[B, T, D] rows of a table.

    A single row is looked up twice: XLA:GPU makes a slice of one, and for it gathers a divided table on every device.
    """
    return table_VD[jnp.repeat(ids_BT, 2, axis=0)][:1] if ids_BT.size == 1 else table_VD[ids_BT]


def get_abstract_model(config: Config, **options: Any) -> Llama4:
    """The model with `jax.ShapeDtypeStruct`s for parameters: 400B are described without memory. Options as for `Llama4`."""
    return nnx.eval_shape(lambda: Llama4(config, rngs=cast(nnx.Rngs, _SameKey()), **options))


class _SameKey:
    """Stands in for `nnx.Rngs` where no value is ever drawn: tracing its counter for every parameter takes quadratic time."""

    def params(self) -> jax.Array:
        return jax.random.key(0)
