"""The kernels of attention over pages, run as ordinary JAX operations, and compiled for a TPU and a GPU that are not there.

Shape suffixes: B rows, T query tokens, J stretches of a row (a page each), N pages, P slots of a page, K key/value heads, G query
heads per key/value head, H query heads, d head size.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from maverick_jax.errors import UserError
from maverick_jax.ops import paged_attention_gpu as on_gpu
from maverick_jax.ops import paged_attention_tpu as on_tpu
from maverick_jax.ops.attention import MASKED, Partial
from maverick_jax.ops.pages import Pages, quantize_keys
from maverick_jax.plan.hlo import count_traffic
from maverick_jax.plan.targets import OPTIONS, devices_of
from maverick_jax.plan.topology import Topology

KERNELS = {"tpu": on_tpu.paged_attention_tpu, "gpu": on_gpu.paged_attention_gpu}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8}  # of the largest: sums in another order; weights are rounded to 8 bits
J, N, P, K, G, d = 12, 40, 128, 2, 5, 128
LAST = {  # the last slot that a row's last token sees
    "like and unlike": [300, 1535, 128, 127, 0],
    "rows that see nothing": [-1, 5, -1, 1535, -1],
    "no row sees anything": [-1] * 5,
}
needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def limits(last_B: list[int], T: int) -> np.ndarray:
    return np.array(last_B, np.int32)[:, None] - np.arange(T, dtype=np.int32)[::-1]


def make_case(last_B: list[int], T: int, dtype: str = "float32", bits: int = 0):
    """Query, pages, table and limits. No row sees a page that is no number, and what stands in the table for no page is none."""
    random = np.random.default_rng(0)
    limit_BT = limits(last_B, T)
    query_BTHd = random.standard_normal((len(last_B), T, K * G, d), np.float32)
    key_NKPd, value_NKPd = random.standard_normal((2, N, K, P, d), np.float32)
    table_BJ = random.integers(1, N, (len(last_B), J)).astype(np.int32)
    table_BJ[np.arange(J)[None, :] * P > limit_BT.max(axis=1)[:, None]] = N + 1000
    never_seen = np.setdiff1d(np.arange(N), table_BJ)
    assert never_seen.size > 0
    key_NKPd[never_seen], value_NKPd[never_seen] = np.nan, np.nan
    key, value = (jnp.asarray(x, dtype) for x in (key_NKPd, value_NKPd))
    if bits:
        (key, key_scale), (value, value_scale) = quantize_keys(key), quantize_keys(value)
        return jnp.asarray(query_BTHd, dtype), Pages(key, value, key_scale, value_scale), jnp.asarray(table_BJ), jnp.asarray(limit_BT)
    return jnp.asarray(query_BTHd, dtype), Pages(key, value), jnp.asarray(table_BJ), jnp.asarray(limit_BT)


def by_query(query_BTHd, pages: Pages, table_BJ, limit_BT):
    """One query after the other, in float64: attention, and the logarithm of the sum of weights. Zeros where nothing is seen."""
    query, table, limit = (np.asarray(x) for x in (query_BTHd.astype(jnp.float32), table_BJ, limit_BT))
    key, value = (np.asarray(x.astype(jnp.float32), np.float64) for x in pages[:2])
    if pages.key_scale_NKP is not None:
        with np.errstate(invalid="ignore"):  # pages that nobody sees
            key, value = key * np.asarray(pages.key_scale_NKP)[..., None], value * np.asarray(pages.value_scale_NKP)[..., None]
    B, T, H, _ = query.shape
    out, total = np.zeros(query.shape), np.full((B, T, H), MASKED)
    for b, t in np.ndindex(B, T):
        seen = np.arange(limit[b, t] + 1)
        if seen.size:
            key_SHd, value_SHd = (np.repeat(x[table[b, seen // P], :, seen % P], G, axis=1) for x in (key, value))
            score_SH = np.einsum("Hd,SHd->SH", query[b, t], key_SHd) * d**-0.5
            weight_SH = np.exp(score_SH)
            total[b, t] = np.log(weight_SH.sum(axis=0))
            out[b, t] = np.einsum("SH,SHd->Hd", weight_SH / weight_SH.sum(axis=0), value_SHd)
    return out, total


def kernel(platform: str, *arguments, first: int = 0) -> Partial:
    return KERNELS[platform](*arguments, page=P, first=jnp.int32(first), interpret=True)


def of_heads(x_BKGT) -> np.ndarray:
    """[B, T, H]."""
    B, *_, T = x_BKGT.shape
    return np.moveaxis(np.asarray(x_BKGT), 3, 1).reshape(B, T, -1)


@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("platform", KERNELS)
def test_a_query_sees_its_row_up_to_its_limit(platform, T, kind):
    """A page of another row, a slot too many or too few, a block left out, a page that nobody sees: the sums are others."""
    arguments = make_case(LAST[kind], T)
    ours = kernel(platform, *arguments)
    out, weight = by_query(*arguments)
    assert all(x.dtype == jnp.float32 for x in ours)
    assert_allclose(ours.finish(jnp.float32), out, atol=TOLERANCE["float32"], rtol=0)
    sees = weight > MASKED
    assert_allclose(of_heads(ours.most_BKGT + jnp.log(ours.total_BKGT))[sees], weight[sees], atol=TOLERANCE["float32"], rtol=0)
    assert (of_heads(ours.most_BKGT)[~sees] == MASKED).all()


def in_parts(pages: Pages, count: int) -> list[tuple[int, Pages]]:
    """What each of several devices has of every page, and its first slot."""
    size = P // count
    return [(at, jax.tree.map(lambda x, at=at: x[:, :, at : at + size], pages)) for at in range(0, P, size)]


@pytest.mark.parametrize("devices,bits", [(1, 0), (1, 8), (4, 0)], ids=["whole", "8 bits", "in parts"])
@pytest.mark.parametrize("platform", KERNELS)
def test_a_piece_of_a_prompt(platform, devices, bits):
    """More queries than a program holds: some see all slots of a block, some a part, some nothing; the last row is short."""
    query, pages, table, limit = make_case([800, 240], 220, bits=bits)
    limit = limit.at[1, 100:].set(-1)
    parts = [kernel(platform, query, some, table, limit, first=at) for at, some in in_parts(pages, devices)]
    merged = functools.reduce(Partial.merge, parts).finish(jnp.float32)
    assert_allclose(merged, by_query(query, pages, table, limit)[0], atol=TOLERANCE["float32"], rtol=0)


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("bits", [0, 8], ids=["bfloat16", "8 bits"])
def test_other_dtypes(platform, bits):
    """Keys and values in 8 bits stand for their products with the scales of head and slot."""
    arguments = make_case(LAST["like and unlike"], 1, "bfloat16", bits)
    expected = by_query(*arguments)[0]
    ours = kernel(platform, *arguments).finish(jnp.float32)
    assert_allclose(ours, expected, atol=TOLERANCE["bfloat16"] * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("platform", KERNELS)
def test_what_nobody_sees_may_be_anything(platform, bits):
    """NaN behind a row's last slot, which somebody else has left there."""
    query, pages, table, limit = make_case([300], 1, bits=bits)
    page, names = int(table[0, 2]), ("key_scale_NKP", "value_scale_NKP") if bits else ("key_NKPd", "value_NKPd")
    dirty = pages._replace(**{name: getattr(pages, name).at[page, :, 301 - 2 * P :].set(jnp.nan) for name in names})
    found, expected = (kernel(platform, query, stored, table, limit).finish(query.dtype) for stored in (dirty, pages))
    assert_allclose(found, expected)


@pytest.mark.parametrize("platform", KERNELS)
def test_devices_that_hold_parts_of_every_page_make_one_sum(platform):
    """Four of them, with 8 bits; some rows end in the middle of a part, and some before the last parts begin."""
    query, pages, table, limit = make_case([300, 1535, 31, 32, 0], 2, bits=8)
    parts = [kernel(platform, query, some, table, limit, first=at) for at, some in in_parts(pages, 4)]
    merged = functools.reduce(Partial.merge, parts).finish(jnp.float32)
    assert_allclose(merged, by_query(query, pages, table, limit)[0], atol=TOLERANCE["float32"], rtol=0)


def abstract_case(B: int, T: int, heads: int, slots: int, stretches: int, dtype: Any, device: Any = None):
    sharding = device and NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    make = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    scales = [make((512, heads, slots), jnp.float32)] * 2 if jnp.dtype(dtype).itemsize == 1 else []
    pages = Pages(*[make((512, heads, slots, 128), dtype)] * 2, *scales)
    return make((B, T, heads * G, 128), jnp.bfloat16), pages, make((B, stretches), jnp.int32), make((B, T), jnp.int32)


@pytest.mark.parametrize(
    "fits,changed",
    [
        (True, {}),
        (True, {"stretches": 2048}),
        (False, {"stretches": 8192}),  # the table does not fit the scalar memory
        (False, {"slots": 2048}),  # nor two pages of keys and of values that for vectors
        (False, {"slots": 12}),
        (True, {"T": 1024}),
        (False, {"dtype": jnp.int8, "slots": 16}),
    ],
    ids=str,
)
def test_what_suits_a_tpu(fits, changed):
    case = {"B": 64, "T": 1, "heads": 8, "slots": 128, "stretches": 64, "dtype": jnp.bfloat16} | changed
    assert on_tpu.suits(*abstract_case(**case)[:3]) is fits


def test_what_suits_a_gpu():
    """Pallas counts in 32 bits what has up to 2^32 bytes: a byte beyond the 2^31st would be someone else's."""
    query, pages = abstract_case(64, 4, 8, 128, 64, jnp.bfloat16)[:2]
    assert on_gpu.suits(query, pages)
    for wrong in ((64, 1, 8, 96, 64, jnp.bfloat16), (64, 1, 8, 8, 64, jnp.bfloat16)):
        assert not on_gpu.suits(*abstract_case(*wrong)[:2])
    for pages_of_128, fits in ((2**14, True), (2**14 + 1, False), (2**15, False), (2**15 + 1, True)):
        values = jax.ShapeDtypeStruct((pages_of_128, 8, 128, 128), jnp.int8)
        assert on_gpu.suits(query, Pages(values, values)) is fits


TARGETS = {  # B, T, heads, slots of a page here, stretches, dtype, slots of a whole page
    "a mesh's part, a million tokens": ((64, 1, 1, 128, 1024, jnp.bfloat16), 1024),
    "drafts, all heads, 8 bits": ((64, 4, 8, 512, 16, jnp.int8), 512),
    "a piece of a long prompt": ((1, 8192, 8, 512, 256, jnp.bfloat16), 512),
    "a mesh's part of pieces, 8 bits": ((4, 1024, 1, 128, 256, jnp.int8), 1024),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("topology", [pytest.param("v6e:2x2", marks=needs_tpu_compiler), "h200:8"])
def test_the_pages_are_read_where_they_lie(topology, kind):
    """Compiled for real: one kernel and no copy of the pages."""
    try:
        device = devices_of(Topology.parse(topology))[0]
    except UserError as error:
        pytest.skip(str(error))
    shapes, page = TARGETS[kind]
    platform = "tpu" if device.platform == "tpu" else "gpu"
    arguments = abstract_case(*shapes, device)
    attend = functools.partial(KERNELS[platform], page=page, first=jnp.int32(0))
    compiled = jax.jit(attend).lower(*arguments).compile(compiler_options=OPTIONS["tpu" if platform == "tpu" else "cuda"])
    queries, stored = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for part in arguments[:2])
    assert compiled.memory_analysis().temp_size_in_bytes < 11e6 + 6 * queries  # in another order, with their sums in float32
    assert count_traffic(compiled.as_text()).hbm < stored + 40e6 + 12 * queries
