"""Causal attention on TPU by the splash kernel that ships with jax: scores never leave the chip's own memory.

Shape suffixes: B batch, T tokens, H query heads, K key/value heads, G query heads per key/value head, d head size.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.typing import DTypeLike

BLOCK = 1024
LANES = 128
LONGEST = 2**16  # the kernel's table of blocks is made before compiling and grows with the square


def suits(T: int, d: int, dtype: DTypeLike) -> bool:
    """Whether the kernel takes this shape, and quickly enough. float32 it would multiply as bfloat16."""
    return d % LANES == 0 and T % BLOCK == 0 and T <= LONGEST and dtype != jnp.float32


def causal_attention_tpu(
    query_BTHd: jax.Array,
    key_BKTd: jax.Array,
    value_BKTd: jax.Array,
    segment_BT: jax.Array | None = None,
    *,
    longest: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attend_in_order` without chunks, where `suits` says yes.

    Args:
      segment_BT: int32; tokens of another segment are not seen.
      longest: tokens of a segment at most: what lies further apart is never computed.
      interpret: on any platform (for tests).
    """
    B, T, H, d = query_BTHd.shape
    K = key_BKTd.shape[1]
    scaled = (query_BTHd.astype(jnp.float32) * d**-0.5).astype(query_BTHd.dtype)  # the kernel does not scale
    query_BKGTd = scaled.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4)
    one = masks.CausalMask((T, T)) if longest is None or longest >= T else masks.LocalMask((T, T), (longest - 1, 0), 0)
    mask = masks.MultiHeadMask([one] * (H // K))
    sizes = kernel.BlockSizes(
        block_q=BLOCK, block_kv=BLOCK, block_kv_compute=BLOCK // 2,
        block_q_dkv=BLOCK, block_kv_dkv=BLOCK, block_kv_dkv_compute=BLOCK // 2, block_q_dq=BLOCK, block_kv_dq=BLOCK,
    )  # fmt: skip
    attend = kernel.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
    segments = None if segment_BT is None else kernel.SegmentIds(segment_BT, segment_BT)
    of_rows = jax.vmap(jax.vmap(attend, (0, 0, 0, None)), (0, 0, 0, None if segments is None else 0))
    out_BKGTd = cast(jax.Array, of_rows(query_BKGTd, key_BKTd, value_BKTd, segments))  # a pair only with residuals
    return out_BKGTd.transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)
