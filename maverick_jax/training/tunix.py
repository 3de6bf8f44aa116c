"""The call that Tunix's trainers make of a model, for those who have a recipe for it: `PeftTrainer(ForTunix(model), optimizer, config)`.

Tunix is no dependency; nothing of it is imported. Its trainers find our adapters by their type, `nnx.LoRAParam`.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maverick_jax.errors import UserError
from maverick_jax.model import Llama4


class ForTunix(nnx.Module):
    """A model that is called as Tunix calls its own.

    Attributes:
      model: has what was learned.
    """

    def __init__(self, model: Llama4):
        self.model = model

    def __call__(
        self, input_tokens: jax.Array, positions: jax.Array, cache: Any = None, attention_mask: jax.Array | None = None, **more: Any
    ) -> tuple[jax.Array, None]:
        """Logits of rows that may be padded on either side.

        Args:
          input_tokens: [B, T] int32.
          positions: [B, T]; ours are counted anew from each row's first real token, as Tunix counts its own.
          attention_mask: [B, T, T] of truth values, causal; a token that does not see itself is padding. None: there is none.

        Returns:
          [B, T, V] float32, and no cache.

        Raises:
          UserError: a cache, or anything else that Tunix's own models take.
        """
        if cache is not None or any(value is not None for value in more.values()):
            extra = "a cache" if cache is not None else next(name for name, value in more.items() if value is not None)
            raise UserError(f"a model for Tunix takes tokens, positions and a mask, not {extra}: draw answers with maverick_jax.Engine.")
        real_BT = jnp.ones(input_tokens.shape, bool) if attention_mask is None else jnp.diagonal(attention_mask, axis1=1, axis2=2)
        model = self.model
        x_BTD = model.embed(jnp.asarray(input_tokens, jnp.int32))
        x_BTD, *_ = model.hidden(x_BTD, document_BT=jnp.where(real_BT, 0, -1))
        return model.logits(x_BTD), None
