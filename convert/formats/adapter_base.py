"""Which weights an adapter belongs to: a digest of the norms, which stands beside an adapter of ours.

Norms are never quantized: the digest is the same in whatever format, dtype and place a model's weights are, and another one after other
training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

BASE = "base.json"


def fingerprint(config: Config, read: Callable[[str], np.ndarray]) -> str:
    """`read` gives a weight by our name."""
    layers = range(config.text.num_hidden_layers)
    norms = [f"text.layers.{i}.{norm}" for i in layers for norm in ("attention_norm", "feed_forward_norm")]
    digest = hashlib.sha256()
    for name in ("text.norm", *norms):
        digest.update(np.asarray(read(name)).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def check_base(directory: Path, norms: str) -> None:
    """Refuse an adapter that says it belongs to other weights; PEFT's own do not say.

    Args:
      norms: the model's `fingerprint`.
    """
    file = directory / BASE
    found = read_json(file).get("norms") if file.is_file() else norms
    if found != norms:
        raise UserError(
            f"{directory} was trained on another base (its norms have the digest {found!s:.40}, this model's {norms}): take the model that "
            "it was trained on."
        )
