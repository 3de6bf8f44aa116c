"""The vision tower: a tile of pixels becomes a square of features.

Shape suffixes: N tiles, P patches and the class token, D vision width, H heads, d head size, F feed-forward width.
Source: Llama 4 reference, `models/llama4/vision/`; spec section 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maverick_jax.config import VisionConfig
from maverick_jax.model.parameter import ones, weight, zeros
from maverick_jax.ops.attention import attend_to_all
from maverick_jax.ops.linear import linear
from maverick_jax.ops.norm import layer_norm, over_last_axis
from maverick_jax.ops.rope import rotate, vision_angles


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) form, in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, D: int, *, dtype: DTypeLike):
        self.scale = ones((D,), ("vision_embed",), dtype)
        self.bias = zeros((D,), ("vision_embed",), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...])


class VisionAttention(nnx.Module):
    """Bidirectional attention over the patches of one tile, with two-dimensional RoPE and biases."""

    def __init__(self, config: VisionConfig, *, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        D, H = config.hidden_size, config.num_attention_heads
        d = D // H
        inwards, bias = (("vision_embed", "vision_heads", None), ("vision_heads", None))
        self.query, self.query_bias = weight(rngs, (D, H, d), inwards, dtype), zeros((H, d), bias, dtype)
        self.key, self.key_bias = weight(rngs, (D, H, d), inwards, dtype), zeros((H, d), bias, dtype)
        self.value, self.value_bias = weight(rngs, (D, H, d), inwards, dtype), zeros((H, d), bias, dtype)
        self.output = weight(rngs, (H, d, D), ("vision_heads", None, "vision_embed"), dtype, inputs=2)
        self.output_bias = zeros((D,), ("vision_embed",), dtype)
        self.angles = (config.grid, d, config.rope_theta)
        self.constrain = constrain

    def __call__(self, x_NPD: jax.Array) -> jax.Array:
        angles = jnp.asarray(vision_angles(*self.angles))[None]
        query, key, value = (
            self.constrain(linear(x_NPD, w[...]) + b[...][None, None], ("tiles", None, "vision_heads", None))
            for w, b in ((self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias))
        )
        out = attend_to_all(rotate(query, angles), rotate(key, angles), value)
        return linear(out, self.output[...], contract=2) + over_last_axis(self.output_bias[...], 3)


class VisionFeedForward(nnx.Module):
    def __init__(self, D: int, F: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up, self.up_bias = weight(rngs, (D, F), ("vision_embed", "vision_mlp"), dtype), zeros((F,), ("vision_mlp",), dtype)
        self.down, self.down_bias = weight(rngs, (F, D), ("vision_mlp", "vision_embed"), dtype), zeros((D,), ("vision_embed",), dtype)

    def __call__(self, x_NPD: jax.Array) -> jax.Array:
        hidden = gelu(linear(x_NPD, self.up[...]) + over_last_axis(self.up_bias[...], 3))
        return linear(hidden, self.down[...]) + over_last_axis(self.down_bias[...], 3)


class VisionLayer(nnx.Module):
    def __init__(self, config: VisionConfig, *, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        D = config.hidden_size
        self.attention_norm = LayerNorm(D, dtype=dtype)
        self.attention = VisionAttention(config, constrain=constrain, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = LayerNorm(D, dtype=dtype)
        self.feed_forward = VisionFeedForward(D, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x_NPD: jax.Array) -> jax.Array:
        x_NPD = x_NPD + self.attention(self.attention_norm(x_NPD))
        return x_NPD + self.feed_forward(self.feed_forward_norm(x_NPD))


class Adapter(nnx.Module):
    """Two products with a GELU after *both*, no bias."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner, outer = config.projector_input_dim, config.projector_output_dim
        shuffled = config.hidden_size * config.shuffle**2
        self.up = weight(rngs, (shuffled, inner), (None, "vision_mlp"), dtype)
        self.down = weight(rngs, (inner, outer), ("vision_mlp", None), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return gelu(linear(gelu(linear(x, self.up[...])), self.down[...]))


class Vision(nnx.Module):
    """Tiles to features: patches, class token last, positions, encoder, pixel shuffle, adapter.

    `embed`, the layers and `adapt` are separate steps, so that each can be looked at.
    """

    def __init__(self, config: VisionConfig, *, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        D = config.hidden_size
        pixels = config.num_channels * config.patch_size**2
        self.patch_embedding = weight(rngs, (pixels, D), (None, "vision_embed"), dtype)
        self.class_embedding = weight(rngs, (D,), ("vision_embed",), dtype)
        self.position_embedding = weight(rngs, (config.grid**2 + 1, D), (None, "vision_embed"), dtype, fan_in=D)
        self.pre_norm = LayerNorm(D, dtype=dtype)
        self.layers = nnx.List(VisionLayer(config, constrain=constrain, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        self.post_norm = LayerNorm(D, dtype=dtype)
        self.adapter = Adapter(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.constrain = constrain

    def __call__(self, tiles_N3SS: jax.Array) -> jax.Array:
        """[N, 3, S, S] float32 pixels in -1..1 -> [N, tokens_per_tile, projector_output_dim] in the weights' dtype."""
        x_NPD = self.embed(tiles_N3SS)
        for layer in self.layers:
            x_NPD = self.constrain(layer(x_NPD), ("tiles", None, None))
        return self.adapt(x_NPD)

    def embed(self, tiles_N3SS: jax.Array) -> jax.Array:
        """[N, 3, S, S] -> [N, P, D]: what the first layer sees."""
        x_NPD = linear(unfold(tiles_N3SS, self.config.patch_size).astype(self.class_embedding.dtype), self.patch_embedding[...])
        N, _, D = x_NPD.shape
        class_token = jnp.broadcast_to(self.class_embedding[...][None, None], (N, 1, D))
        x_NPD = jnp.concatenate([x_NPD, class_token], axis=1) + self.position_embedding[...][None]
        return self.constrain(self.pre_norm(x_NPD), ("tiles", None, None))

    def adapt(self, x_NPD: jax.Array) -> jax.Array:
        """What the last layer gives, without the class token -> [N, tokens_per_tile, projector_output_dim]."""
        return self.adapter(pixel_shuffle(self.post_norm(x_NPD)[:, :-1], self.config.grid, self.config.shuffle))


def unfold(tiles_NCSS: jax.Array, patch: int) -> jax.Array:
    """[N, C, S, S] -> [N, (S / patch)^2, C * patch^2]: patches row by row, features ordered (channel, y, x)."""
    N, C, S, _ = tiles_NCSS.shape
    grid = S // patch
    cut = tiles_NCSS.reshape(N, C, grid, patch, grid, patch)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(N, grid * grid, C * patch * patch)


def pixel_shuffle(x_NPD: jax.Array, grid: int, side: int) -> jax.Array:
    """Squares of side x side patches become one token: [N, grid^2, D] -> [N, (grid / side)^2, side^2 * D], ordered (y, x, D)."""
    N, _, D = x_NPD.shape
    out = grid // side
    cut = x_NPD.reshape(N, out, side, out, side, D)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(N, out * out, side * side * D)
