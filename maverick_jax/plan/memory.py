"""What lies in a device's memory: weights and cache exactly as the layout places them, temporaries by estimate."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

import jax

from maverick_jax.config import TextConfig
from maverick_jax.inference.cache import make_pages
from maverick_jax.inference.sizes import PIECE, next_power_of_two
from maverick_jax.inference.steps import Geometry
from maverick_jax.ops.attention import MOST_SCORES
from maverick_jax.plan.case import Case
from maverick_jax.plan.weights import DENSE, SHARED, itemsize
from maverick_jax.sharding.attend import KEYS, PAGES

RESERVE = 0.06  # of the memory: the runtime, communication buffers, fragmentation, and GB that are no GiB (chips.py)
DISPATCH_ROOM = 2  # rows of a dispatcher's buffers of fixed size, as a multiple of the tokens
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes per device.

    Attributes:
      weights: by component.
      temporaries: what a step needs for itself, by kind.
      capacity: all of the device's memory, the reserve included.
    """

    weights: dict[str, int]
    temporaries: dict[str, int]
    capacity: int

    @property
    def state(self) -> dict[str, int]:
        """What else stays from step to step, by name."""
        return {}

    @property
    def pieces(self) -> dict[str, int]:
        """All there is, by name."""
        return self.weights | self.state | {f"temporaries, {kind}": size for kind, size in self.temporaries.items() if size}

    @property
    def needed(self) -> int:
        return sum(self.pieces.values())

    @property
    def usable(self) -> int:
        return int(self.capacity * (1 - RESERVE))

    @property
    def free(self) -> int:
        """What is left of the usable memory; negative: what is missing."""
        return self.usable - self.needed

    @property
    def fits(self) -> bool:
        return self.free >= 0


@dataclasses.dataclass(frozen=True)
class Memory(Held):
    """Of a model that answers; `temporaries` are the larger of a decode step's and a prefill piece's.

    Attributes:
      rope_cache, full_cache: of the layers with an attention chunk, and of those that see everything.
    """

    rope_cache: int
    full_cache: int

    @property
    def state(self) -> dict[str, int]:
        return {"cache, RoPE layers": self.rope_cache, "cache, NoPE layers": self.full_cache}


def memory(case: Case) -> Memory:
    """The memory of a case."""
    chunked, full = cache_bytes(case)
    decode, prefill = temporaries(case, case.batch, 1), temporaries(case, prefill_rows(case), prefill_piece(case))
    largest = max(decode, prefill, key=lambda kinds: sum(kinds.values()))
    return Memory(case.weight_bytes, largest, case.topology.chip.memory, chunked, full)


def cache_bytes(case: Case) -> tuple[int, int]:
    """Bytes per device of the layers with an attention chunk, and of those that see the whole context."""
    found = [0, 0]
    for (shape, sees_all), count in _cache_shapes(case.config.text, case.batch, case.context).items():
        found[sees_all] += math.prod(case.local(PAGES, shape)) * itemsize(case.dtype) * count
    return found[0], found[1]


@functools.lru_cache(maxsize=64)
def _cache_shapes(config: TextConfig, batch: int, context: int) -> dict[tuple[tuple[int, ...], bool], int]:
    """(shape, whether the layer sees the whole context) -> arrays, keys and values counted one by one."""
    g = Geometry.of(config, batch, context)
    layers = jax.eval_shape(lambda: make_pages(config, g.places, g.pages, g.max_length, g.page, "bfloat16"))
    stored = ((jax.tree.leaves(pages), chunk) for pages, chunk in zip(layers, g.chunks, strict=True))
    return collections.Counter((x.shape, chunk is None) for arrays, chunk in stored for x in arrays)


def prefill_rows(case: Case) -> int:
    """Prompts that are prefilled together: one for each share of the batch."""
    return min(case.batch, case.row_ways)


def prefill_piece(case: Case) -> int:
    """Tokens of a prompt that a prefill takes at once."""
    return min(case.context, PIECE // next_power_of_two(prefill_rows(case)))


def temporaries(case: Case, rows: int, tokens: int) -> dict[str, int]:
    """Bytes per device that a step needs beside weights and cache: an estimate of the largest of each kind, once.

    With R rows and N = R * tokens on this device, element size e:
      activations   N * (4 * D + 3 * F) * e: residual, normed, attention's or feed-forward's input and output; gate, up and
                    their product, F the widest feed-forward's share
      scores        R * heads * tokens * context * (4 + e): float32 scores and the weights made of them; of several tokens
                    no more than MOST_SCORES at once
      logits        2 * R * V * 4: of each row's last token, and what sampling makes of them
      dispatch      4 * DISPATCH_ROOM * tokens sent * D * e: sent, received, computed, returned
    """
    text, size = case.config.text, itemsize(case.dtype)
    D = text.hidden_size
    (R,) = case.local(("batch",), (rows,))
    width = max([text.intermediate_size_mlp] * (DENSE in case.weight_bytes) + [text.intermediate_size] * (SHARED in case.weight_bytes))
    (F,) = case.local(("mlp",), (width,))
    (V,) = case.local(("vocab",), (text.vocab_size,))
    (asking,) = case.local((KEYS[0],), (rows,))
    (heads,) = case.local(("heads",), (text.num_attention_heads,))
    seen = max(min(case.context, text.chunk_of_layer(i) or case.context) for i in range(text.num_hidden_layers))
    scores = asking * heads * tokens * seen
    sent = math.ceil(rows * tokens / case.ways("tokens"))
    return {
        "activations": R * tokens * (4 * D + 3 * F) * size,
        "scores": (scores if tokens == 1 else min(scores, MOST_SCORES)) * (FLOAT32 + size),
        "logits": 2 * R * V * FLOAT32,
        "dispatch": 4 * DISPATCH_ROOM * sent * D * size if text.moe_layers else 0,
    }
