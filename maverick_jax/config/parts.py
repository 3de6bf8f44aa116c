"""The parts of a model's configuration: text decoder, RoPE scaling, vision tower."""

from __future__ import annotations

import dataclasses

from maverick_jax.config import checks
from maverick_jax.errors import UserError

NOPE_INTERVAL = 4  # every fourth layer attends globally and has no rotary embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of type "llama3": long wavelengths are divided by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        checks.check(vars(self), checks.ROPE_SCALING)
        if self.high_freq_factor < self.low_freq_factor:  # the references disagree on what that means
            raise UserError(f"high_freq_factor ({self.high_freq_factor}) is below low_freq_factor ({self.low_freq_factor}).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text decoder. `nope_layers` and `moe_layers` are layer indices; an attention chunk of None means full attention.

    With `tie_word_embeddings` the embedding is the unembedding too, and the model has no parameter for the latter.

    Raises:
      UserError: a value that no model has, or values that disagree.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # routed experts and the shared expert
    intermediate_size_mlp: int  # dense layers
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    moe_layers: tuple[int, ...]
    nope_layers: tuple[int, ...]
    attention_chunk_size: int | None = 8192
    use_qk_norm: bool = False
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False

    def __post_init__(self):
        checks.check(vars(self), checks.TEXT | {"rope_scaling": checks.or_none(checks.instance_of(RopeScaling))})
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key/value heads evenly.")
        if self.moe_layers and not self.num_local_experts:
            raise UserError(f"layer {self.moe_layers[0]} is a mixture of experts, but there are 0 of them.")
        for name, layers in (("moe_layers", self.moe_layers), ("no_rope_layers", self.nope_layers)):
            if layers and layers[-1] >= self.num_hidden_layers:
                raise UserError(f"{name} names layer {layers[-1]}; the {self.num_hidden_layers} layers are counted from 0.")

    def chunk_of_layer(self, layer: int) -> int | None:
        """Attention chunk of a layer: None (full attention) on the layers without RoPE."""
        return None if layer in self.nope_layers else self.attention_chunk_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower, its adapter and the size of the projector's input."""

    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1408
    intermediate_size: int = 5632
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 4096
    pixel_shuffle_ratio: float = 0.5
    rope_theta: float = 10000.0
    max_tiles: int = 16

    def __post_init__(self):
        checks.check(vars(self), checks.VISION, "vision ")
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 4:
            raise UserError("vision hidden_size / num_attention_heads must be a whole multiple of 4 (two axes of rotated pairs).")
        if self.image_size % self.patch_size or (self.image_size // self.patch_size) % self.shuffle:
            raise UserError("vision image_size must be a whole number of patches that the pixel shuffle divides.")
        if self.intermediate_size != self.hidden_size * self.shuffle**2:
            raise UserError("vision intermediate_size must be hidden_size / pixel_shuffle_ratio^2: it is also the adapter's input.")
        if not self.vision_output_dim == self.projector_output_dim == self.projector_input_dim:
            raise UserError("vision_output_dim, projector_input_dim and projector_output_dim differ: they name one width.")

    @property
    def shuffle(self) -> int:
        """Side of the square of patches that becomes one token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2
