"""The text decoder: embedding, layers, final norm, unembedding (the embedding once more where the two are tied).

Shape suffixes: B batch, T tokens, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from maverick_jax.config import TextConfig
from maverick_jax.model.attention import Attention, Piece
from maverick_jax.model.feed_forward import FeedForward
from maverick_jax.model.moe import MoE
from maverick_jax.model.parameter import ones, weight
from maverick_jax.ops.linear import AdaptedWeight, linear_float32
from maverick_jax.ops.norm import rms_norm
from maverick_jax.sharding.attend import Attend
from maverick_jax.sharding.dispatch import Dispatcher, Stats

RESIDUAL = ("batch", "sequence", None)


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward (dense or mixture of experts), each added to the residual stream."""

    def __init__(
        self, config: TextConfig, layer: int, *, dispatcher: Dispatcher, attend: Attend, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        D = config.hidden_size
        self.attention_norm = ones((D,), ("embed",), dtype)
        self.attention = Attention(config, layer, attend=attend, constrain=constrain, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = ones((D,), ("embed",), dtype)
        if layer in config.moe_layers:
            self.feed_forward = MoE(config, dispatcher=dispatcher, constrain=constrain, dtype=dtype, rngs=rngs)
        else:
            self.feed_forward = FeedForward(D, config.intermediate_size_mlp, dtype=dtype, rngs=rngs)
        self.eps = config.rms_norm_eps
        self.constrain = constrain

    def __call__(
        self, x_BTD: jax.Array, piece: Piece, cache: Any, *, last_only: bool = False, expert_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Stats | None]:
        """`last_only` computes every row's last token alone: [B, 1, D]; its keys and values are cached all the same."""
        attended, cache = self.attention(rms_norm(x_BTD, self.attention_norm[...], self.eps), piece, cache, last_only=last_only)
        if last_only:
            x_BTD, piece = piece.pick_last(x_BTD), piece.last
        x_BTD = self.constrain(x_BTD + attended, RESIDUAL)
        transformed, stats = self.feed_forward(rms_norm(x_BTD, self.feed_forward_norm[...], self.eps), piece.real_BT, expert_BT)
        return self.constrain(x_BTD + transformed, RESIDUAL), cache, stats


class Text(nnx.Module):
    """The decoder. `embed`, the layers and `logits` are separate steps, so that images enter between the first two."""

    def __init__(self, config: TextConfig, *, dispatcher: Dispatcher, attend: Attend, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.embedding = weight(rngs, (V, D), ("vocab", "table_embed"), dtype, fan_in=1)
        self.layers = nnx.List(
            Layer(config, i, dispatcher=dispatcher, attend=attend, constrain=constrain, dtype=dtype, rngs=rngs)
            for i in range(config.num_hidden_layers)
        )
        self.norm = ones((D,), ("embed",), dtype)
        if not config.tie_word_embeddings:
            self.unembedding = weight(rngs, (D, V), ("table_embed", "vocab"), dtype)
        self.eps, self.tied, self.moe_layers = config.rms_norm_eps, config.tie_word_embeddings, config.moe_layers
        self.remat: Any = None  # what a gradient makes again: None nothing, or a policy of `jax.checkpoint_policies` what it keeps

    def __call__(
        self, x_BTD: jax.Array, piece: Piece, caches: Any = None, *, last_only: bool = False, expert_BTM: jax.Array | None = None
    ) -> tuple[jax.Array, Any, tuple[Stats, ...]]:
        """Through all layers and the final norm.

        Args:
          caches: one layer cache per layer, or None.
          last_only: the last token of every row is all that is read, so the last layer computes no other.
          expert_BTM: the expert of each mixture that tokens go to, whatever the routers say now; None: where they say.

        Returns:
          [B, T, D] ([B, 1, D] with last_only) normed hidden states, the new layer caches (None without), and the stats of the MoE layers.
        """
        new_caches, all_stats = [], []
        for i, layer in enumerate(self.layers):
            cache, last = None if caches is None else caches[i], last_only and i == len(self.layers) - 1
            expert_BT = None if expert_BTM is None or i not in self.moe_layers else expert_BTM[..., self.moe_layers.index(i)]
            call = functools.partial(layer if self.remat is None else _made_again(layer, self.remat), last_only=last)
            x_BTD, cache, stats = call(x_BTD, piece, cache, expert_BT=expert_BT)
            new_caches.append(cache)
            if stats is not None:
                all_stats.append(stats)
        return rms_norm(x_BTD, self.norm[...], self.eps), None if caches is None else tuple(new_caches), tuple(all_stats)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] normed hidden states -> [..., V] float32."""
        return linear_float32(x, self.head)

    @property
    def head(self) -> AdaptedWeight:
        """[D, V] what hidden states are multiplied by."""
        return self.embedding[...].T if self.tied else self.unembedding[...]


def _made_again(layer: Layer, policy: Any) -> Callable[..., Any]:
    """The layer's call, of which a gradient keeps what the policy says and makes the rest again."""
    graphdef, state = nnx.split(layer)

    def call(state, x_BTD, *rest, last_only, expert_BT):
        return nnx.merge(graphdef, _when_there(state, x_BTD))(x_BTD, *rest, last_only=last_only, expert_BT=expert_BT)

    return lambda *inputs, last_only, expert_BT: jax.checkpoint(
        functools.partial(call, last_only=last_only, expert_BT=expert_BT), policy=policy
    )(state, *inputs)


@jax.custom_vjp
def _when_there(weights: Any, x_BTD: jax.Array) -> Any:
    """The same weights, but not before x is there: XLA would begin with gathering the parts of all layers, and hold them all."""
    return jax.lax.optimization_barrier((weights, x_BTD))[0]


def _when_there_forward(weights, x_BTD):
    return _when_there(weights, x_BTD), None


def _when_there_backward(_, gradient):
    return gradient, None


_when_there.defvjp(_when_there_forward, _when_there_backward)
