"""What a Llama 4 model is: sizes, switches and special ids, and the files that say so.

Field names are those of Hugging Face's `config.json`, so a value can be looked up in either place. What the releases spell
in several ways (RoPE, NoPE layers, MoE layers) is resolved here, once.
"""

from maverick_jax.config.model import Config
from maverick_jax.config.parts import NOPE_INTERVAL, RopeScaling, TextConfig, VisionConfig

__all__ = ["NOPE_INTERVAL", "Config", "RopeScaling", "TextConfig", "VisionConfig"]
