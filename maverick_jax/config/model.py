"""`Config`: a whole model, the releases' sizes, and where its values come from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from maverick_jax.config import checks, huggingface, meta
from maverick_jax.config.parts import NOPE_INTERVAL, RopeScaling, TextConfig, VisionConfig
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole model: text, vision (None for text-only checkpoints), special ids and the stored dtype.

    Raises:
      UserError: a value that no model has.
    """

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_index: int = 200092  # <|patch|>
    bos_token_id: int = 200000
    eos_token_id: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int = 200018
    dtype: str = "bfloat16"

    def __post_init__(self):
        parts = {"text": checks.instance_of(TextConfig), "vision": checks.or_none(checks.instance_of(VisionConfig))}
        checks.check(vars(self), checks.MODEL | parts)

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
        """Read `config.json` (Hugging Face) or `params.json` (Meta) of a checkpoint directory.

        Raises:
          UserError: there is neither, or a value that no model has, by file and field.
        """
        directory = checks.path_of("path", path)
        if not os.path.isdir(directory):
            raise UserError(f"{directory} {'is a file' if os.path.exists(directory) else 'does not exist'}: give a checkpoint's directory.")
        for name, read in (("config.json", cls.from_huggingface), ("params.json", cls.from_meta)):
            file = directory / name
            if file.is_file():
                values = read_json(file)
                try:
                    config = read(values)
                except UserError as error:
                    raise UserError(f"{file}: {error}") from error
                return config._with_generation_config(directory / "generation_config.json")
        raise UserError(f"{directory} is not a checkpoint: it has neither config.json nor params.json.")

    @classmethod
    def from_huggingface(cls, values: dict[str, Any]) -> Config:
        """Read the contents of a `config.json`, in the spelling of transformers 4.51 or 5.x, nested or flat (text only)."""
        return cls(**huggingface.read(values))

    @classmethod
    def from_meta(cls, values: dict[str, Any]) -> Config:
        """Read the contents of a Meta `params.json`."""
        return cls(**meta.read(values))

    def to_huggingface(self) -> dict[str, Any]:
        """The contents of a `config.json` (transformers 5.x spelling) that describes this model."""
        return huggingface.write(vars(self))

    def _with_generation_config(self, file: Path) -> Config:
        """Stop ids of `generation_config.json` win: fine-tunes change them there."""
        if not file.is_file() or (stop := read_json(file, advice="fetch it again or remove it").get("eos_token_id")) is None:
            return self
        try:
            return dataclasses.replace(self, eos_token_id=huggingface.read_stop_ids(stop))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


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
