"""What a Llama 4 model is: sizes, switches and special ids, read from `config.json` or `params.json`.

Field names are those of Hugging Face's `config.json`, so a value can be looked up in either place. What the
releases spell in several ways (RoPE, NoPE layers, MoE layers) is resolved here, once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

NOPE_INTERVAL = 4  # every fourth layer attends globally and has no rotary embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of type "llama3": long wavelengths are divided by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text decoder. `nope_layers` and `moe_layers` are layer indices; an attention chunk of None means full attention."""

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

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): check both in config.json."
            )
        for name, layers in (("moe_layers", self.moe_layers), ("no_rope_layers", self.nope_layers)):
            if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
                raise UserError(f"{name} names a layer outside 0..{self.num_hidden_layers - 1}: {list(layers)}")

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole model: text, vision (None for text-only checkpoints), special ids and the stored dtype."""

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_index: int = 200092  # <|patch|>
    bos_token_id: int = 200000
    eos_token_id: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int = 200018
    dtype: str = "bfloat16"

    @classmethod
    def maverick(cls) -> Config:
        """Llama 4 Maverick 17B-128E: 401,583,781,376 parameters (spec section 1)."""
        text = TextConfig(**_RELEASE_TEXT, num_local_experts=128, moe_layers=tuple(range(1, 48, 2)), max_position_embeddings=1048576)
        return cls(text=text, vision=VisionConfig())

    @classmethod
    def scout(cls) -> Config:
        """Llama 4 Scout 17B-16E: 108,641,793,536 parameters (spec section 1)."""
        text = TextConfig(
            **_RELEASE_TEXT,
            num_local_experts=16,
            moe_layers=tuple(range(48)),
            max_position_embeddings=10485760,
            use_qk_norm=True,
            rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192),
        )
        return cls(text=text, vision=VisionConfig())

    @classmethod
    def from_directory(cls, path: str | Path) -> Config:
        """Read `config.json` (Hugging Face) or `params.json` (Meta) of a checkpoint directory."""
        directory = Path(path)
        for name, read in (("config.json", cls.from_huggingface), ("params.json", cls.from_meta)):
            file = directory / name
            if file.is_file():
                values = read_json(file)
                try:
                    config = read(values)
                except UserError as error:
                    raise UserError(f"{file}: {error}") from error
                except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
                    raise UserError(f"{file} has a value that no model has ({error}): fetch it again.") from error
                return config._with_generation_config(directory / "generation_config.json")
        raise UserError(f"{directory} is not a checkpoint: it has neither config.json nor params.json.")

    @classmethod
    def from_huggingface(cls, values: dict[str, Any]) -> Config:
        """Read the contents of a `config.json`, in the spelling of transformers 4.51 or 5.x, nested or flat (text only)."""
        from maverick_jax import config_files

        return config_files.read_huggingface(values)

    @classmethod
    def from_meta(cls, values: dict[str, Any]) -> Config:
        """Read the contents of a Meta `params.json`."""
        from maverick_jax import config_files

        return config_files.read_meta(values)

    def to_huggingface(self) -> dict[str, Any]:
        """The contents of a `config.json` (transformers 5.x spelling) that describes this model."""
        from maverick_jax import config_files

        return config_files.write_huggingface(self)

    def _with_generation_config(self, file: Path) -> Config:
        """Stop ids of `generation_config.json` win: fine-tunes change them there."""
        if not file.is_file():
            return self
        stop = read_json(file, advice="fetch it again or remove it").get("eos_token_id")
        if stop is None:
            return self
        return dataclasses.replace(self, eos_token_id=tuple(stop) if isinstance(stop, list) else (stop,))


_RELEASE_TEXT: dict[str, Any] = dict(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    nope_layers=tuple(range(NOPE_INTERVAL - 1, 48, NOPE_INTERVAL)),
)
