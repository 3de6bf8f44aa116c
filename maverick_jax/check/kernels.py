"""The kernels of a machine against a reference in float64, at the sizes that one device has of a model on a mesh.

Each runs as the model runs it. Of what it gives some is computed again on the host, from the same operands.

Shape suffixes: R rows, D inputs, F outputs, E experts, T tokens, S key slots, H query heads, K key/value heads, G query heads per
key/value head, d head size, B rows of a batch, J pages of a row, N pages, P slots of a page.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from maverick_jax.config import Config
from maverick_jax.inference.cache import page_size
from maverick_jax.model.parameter import parameter_name
from maverick_jax.ops.attention import attend_in_order, attend_to_all
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.linear import linear
from maverick_jax.ops.paged_attention import attend_pages
from maverick_jax.ops.pages import Pages, held
from maverick_jax.ops.quantize import QuantizedArray, Weight, dequantize, matrix_shape
from maverick_jax.plan.weights import DTYPES, abstract_model
from maverick_jax.sharding import Layout

ROWS = 64  # of a product by experts: a decode step's
TOKENS = {"cpu": 256}  # of a prompt, and of what a row holds
TOKENS_ELSEWHERE = 4096
BATCH = 4
COLUMNS = 64  # of a product that are computed again
# ‖ours - reference‖ / ‖reference‖: sums in another order, and results (of attention also the weights) rounded once.
ALLOWED = {"float32": 1e-5, "bfloat16": 1e-2}


class Case(NamedTuple):
    """A kernel with its operands.

    Attributes:
      shapes: of the operands, for people.
      both: from its result to a part of it and the same in float64.
      moved: bytes that it reads at least.
      flops: products and sums that it makes at least.
    """

    shapes: str
    function: Callable[..., jax.Array]
    operands: tuple[Any, ...]
    both: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    moved: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one device has of a model.

    Attributes:
      shapes: of the leaves of a layer, such as `feed_forward.experts.gate`, of each name those of the first layer that has it.
      dtypes: theirs.
    """

    config: Config
    dtype: jnp.dtype
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, jnp.dtype]

    @classmethod
    def of(cls, config: Config, mesh: Mesh, layout: Layout, dtype: str) -> Sizes:
        """`dtype`: one of `plan.weights.DTYPES`."""
        shapes, dtypes = {}, {}
        for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config, dtype))):
            name = re.sub(r".*layers\.\d+\.", "vision." if path[0] == "vision" else "", parameter_name(path))
            if name not in shapes:
                shapes[name] = layout.sharding(leaf.get_metadata()["axes"], leaf.shape, mesh).shard_shape(leaf.shape)
                dtypes[name] = jnp.dtype(leaf.dtype)
        return cls(config, jnp.dtype(DTYPES[dtype]), shapes, dtypes)

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, K and d."""
        _, H, d = self.shapes["attention.query"]
        return H, self.shapes["attention.key"][1], d


def cases(sizes: Sizes, platform: str, most_bytes: float) -> dict[str, Callable[[], Case]]:
    """What makes each kernel that the model has a use for; of stacks as many experts as `most_bytes` hold."""
    random = Random(sizes.dtype)
    tokens = TOKENS.get(platform, TOKENS_ELSEWHERE)
    found: dict[str, Callable[[], Case]] = {}
    if "feed_forward.gate" in sizes.shapes:
        found["dense product"] = lambda: _dense(random, sizes.shapes["feed_forward.gate"])
    for name in ("gate", "down"):
        leaves = [leaf for leaf in sizes.shapes if leaf.startswith(f"feed_forward.experts.{name}")]
        if leaves:
            found[f"experts, {name}"] = functools.partial(_experts, random, sizes, leaves, most_bytes)
    found["a prompt"] = lambda: _prompt(random, sizes, tokens)
    found["over the cache"] = lambda: _cached(random, sizes, tokens, 1, platform)
    found["a piece behind"] = lambda: _cached(random, sizes, tokens, tokens // 4, platform)
    if sizes.config.vision is not None:
        found["a tile"] = lambda: _vision(random, sizes)
    return found


class Random:
    """Operands that differ from each other, made on the device, and in every run the same."""

    def __init__(self, dtype: jnp.dtype):
        self.dtype, self.made = dtype, 0

    def __call__(self, *shape: int, dtype: Any = None) -> jax.Array:
        """Between -2 and 2, all bits by chance; of integers all bits too."""
        self.made += 1
        return _random(jax.random.key(self.made, impl="rbg"), shape, jnp.dtype(dtype or self.dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key, shape, dtype):
    if jnp.issubdtype(dtype, jnp.integer):
        return lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    bits = jax.random.bits(key, shape, jnp.uint32 if dtype == jnp.float32 else jnp.uint16)
    half = 2.0 ** (8 * bits.dtype.itemsize - 1)
    return (bits.astype(jnp.float32) / half * 2 - 2).astype(dtype)


def _dense(random, shape):
    D, F = shape
    x_RD, weight_DF = random(8, D), random(D, F)
    columns = np.linspace(0, F - 1, min(COLUMNS, F)).astype(int)

    def both(y_RF):
        return y_RF[:, columns], _float64(x_RD) @ _float64(weight_DF[:, columns])

    return Case(_shapes(8, weight_DF), jax.jit(linear), (x_RD, weight_DF), both, weight_DF.nbytes, 16.0 * D * F)


def _experts(random, sizes, leaves, most_bytes):
    of_all = sum(np.prod(sizes.shapes[leaf]) * sizes.dtypes[leaf].itemsize for leaf in leaves)
    count = sizes.shapes[leaves[0]][0]
    count = max(1, min(count, int(most_bytes * count / of_all)))
    stored = [random(count, *sizes.shapes[leaf][1:], dtype=sizes.dtypes[leaf]) for leaf in sorted(leaves, reverse=True)]
    weight = QuantizedArray(*stored) if len(stored) > 1 else stored[0]  # values, scales
    E, D, F = matrix_shape(weight)
    expert_R = np.sort(np.random.default_rng(0).integers(0, E, ROWS))
    sizes_E, x_RD = jnp.asarray(np.bincount(expert_R, minlength=E), jnp.int32), random(ROWS, D)
    rows, columns = np.linspace(0, ROWS - 1, 5).astype(int), np.linspace(0, F - 1, min(COLUMNS, F)).astype(int)

    def both(y_RF):
        expected = []
        for row in rows:
            one = jax.tree.map(lambda a, e=expert_R[row]: a[e][:, columns], weight)
            matrix = dequantize(one, dtype=jnp.float32) if isinstance(one, QuantizedArray) else one
            expected.append(_float64(x_RD[row]) @ _float64(matrix))
        return y_RF[rows][:, columns], np.stack(expected)

    read = sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) * len(set(expert_R.tolist())) / E
    return Case(_shapes(ROWS, weight), jax.jit(grouped_matmul), (x_RD, weight, sizes_E), both, read, 2.0 * ROWS * D * F)


def _prompt(random, sizes, T):
    H, K, d = sizes.heads
    query, key, value = random(1, T, H, d), random(1, K, T, d), random(1, K, T, d)
    asking = np.array([0, T // 2, T - 1])
    seen_QS = np.arange(T)[None, :] <= asking[:, None]

    def both(out_1THd):
        return out_1THd[0, asking], _attention(query[0, asking], key[0], value[0], seen_QS)

    shapes = f"{T:,} tokens, {H} query and {K} key heads of {d}"
    moved = query.nbytes * 2 + key.nbytes * 2
    return Case(shapes, jax.jit(lambda q, k, v: attend_in_order(q, k, v, None)), (query, key, value), both, moved, 2.0 * T * T * H * d)


def _cached(random, sizes, T, asking, platform):
    H, K, d = sizes.heads
    P = page_size(sizes.config.text, T)
    J = -(-T // P)
    table_BJ = jnp.asarray(np.random.default_rng(0).permutation(BATCH * J).reshape(BATCH, J), jnp.int32)
    key_NKPd, value_NKPd = random(BATCH * J, K, P, d), random(BATCH * J, K, P, d)
    in_cache = held(sizes.dtype, cpu=platform == "cpu")
    pages = Pages(*(x if x.dtype == in_cache else lax.bitcast_convert_type(x, in_cache) for x in (key_NKPd, value_NKPd)))
    query = random(BATCH, asking, H, d)
    last_B1 = np.linspace(asking - 1, T - 1, BATCH).astype(np.int32)[:, None]
    limit_BQ = last_B1 - np.arange(asking, dtype=np.int32)[None, ::-1]

    @jax.jit
    def over(query, pages, table_BJ, limit_BQ):
        return attend_pages(query, pages, table_BJ, limit_BQ, page=P, first=jnp.int32(0))

    def both(out_BQHd):
        some, expected = np.unique([0, asking // 2, asking - 1]), []
        for row in range(BATCH):
            seen = np.arange(J * P)[None, :] <= limit_BQ[row, some][:, None]
            key, value = (x[table_BJ[row]].swapaxes(0, 1).reshape(K, J * P, d) for x in (key_NKPd, value_NKPd))
            expected.append(_attention(query[row, some], key, value, seen))
        return out_BQHd[:, some], np.stack(expected)

    moved = 2.0 * K * d * sizes.dtype.itemsize * (last_B1 + 1).sum()
    shapes = f"{BATCH} x {asking:,} tokens, up to {T:,} in pages of {P}"
    operands = query, pages, table_BJ, jnp.asarray(limit_BQ)
    return Case(shapes, over, operands, both, moved, 4.0 * H * d * (limit_BQ + 1.0).sum())


def _vision(random, sizes):
    _, H, d = sizes.shapes["vision.attention.query"]
    P = sizes.config.vision.grid**2 + 1
    query, key, value = random(1, P, H, d), random(1, P, H, d), random(1, P, H, d)
    asking = np.array([0, P // 2, P - 1])

    def both(out_1PHd):
        return out_1PHd[0, asking], _attention(query[0, asking], key[0].swapaxes(0, 1), value[0].swapaxes(0, 1), np.ones((3, P), bool))

    shapes = f"{P} patches, {H} heads of {d}"
    return Case(shapes, jax.jit(attend_to_all), (query, key, value), both, query.nbytes * 4, 4.0 * P * P * H * d)


def _attention(query_QHd, key_KSd, value_KSd, seen_QS):
    """[Q, H, d] in float64; `seen_QS` says which keys each query sees."""
    query, key, value = map(_float64, (query_QHd, key_KSd, value_KSd))
    Q, H, d = query.shape
    scores_QKGS = np.einsum("QKGd,KSd->QKGS", query.reshape(Q, len(key), -1, d), key) * d**-0.5
    scores_QKGS = np.where(seen_QS[:, None, None], scores_QKGS, -np.inf)
    weights = np.exp(scores_QKGS - scores_QKGS.max(axis=-1, keepdims=True))
    return np.einsum("QKGS,KSd->QKGd", weights / weights.sum(axis=-1, keepdims=True), value).reshape(Q, H, d)


def _float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _shapes(rows: int, weight: Weight) -> str:
    values = weight.values if isinstance(weight, QuantizedArray) else weight
    stored = "int4" if isinstance(weight, QuantizedArray) and weight.packed else values.dtype
    return f"{rows} rows by {list(matrix_shape(weight))} {stored}"
