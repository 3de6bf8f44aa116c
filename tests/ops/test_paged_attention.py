"""Attention over pages in plain operations, and what is written into them: as over the row's keys laid out in order."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.ops import paged_attention
from maverick_jax.ops.attention import Keys, Partial, attention
from maverick_jax.ops.paged_attention import attend_pages, over_pages, write_tokens
from maverick_jax.ops.pages import Pages
from oracle.compiling import on_an_h200

PAGE, STRETCHES, HEADS, KV_HEADS, SIZE = 8, 5, 4, 2, 16


@pytest.fixture(params=[2**25, 2**9], ids=["at once", "some queries after the other"])
def few_scores(request, monkeypatch):
    monkeypatch.setattr(paged_attention, "MOST_SCORES", request.param)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (2, 13)])
def test_pages_in_any_order(few_scores, rows, tokens, parts):
    """Rows of other lengths, one that sees nothing, pages that are nobody's, and a device's part of each page: sums that add up."""
    random = np.random.default_rng(rows * tokens)
    pages = Pages(*(jnp.asarray(random.normal(size=(20, KV_HEADS, PAGE, SIZE)), jnp.float32) for _ in range(2)))
    table = jnp.asarray(random.permutation(20)[: rows * STRETCHES].reshape(rows, STRETCHES), jnp.int32)
    query = jnp.asarray(random.normal(size=(rows, tokens, HEADS, SIZE)), jnp.float32)
    limit = jnp.asarray(random.integers(-1, PAGE * STRETCHES, (rows, tokens)), jnp.int32).at[0, 0].set(11)
    width, look = PAGE // parts, jax.jit(over_pages, static_argnames="page")
    own = [Pages(*(x[:, :, i * width : (i + 1) * width] for x in pages[:2])) for i in range(parts)]
    sums = [look(query, part, table, limit, page=PAGE, first=jnp.int32(i * width)) for i, part in enumerate(own)]
    out = functools.reduce(Partial.merge, sums).finish(query.dtype)
    key, value = (jnp.moveaxis(x[table], 2, 1).reshape(rows, KV_HEADS, -1, SIZE) for x in pages[:2])
    sees = jnp.arange(PAGE * STRETCHES)[None, None, :] <= limit[:, :, None]
    expected = attention(query, key, value, sees)
    assert_allclose(np.where(limit[..., None, None] >= 0, out, 0), np.where(limit[..., None, None] >= 0, expected, 0), atol=2e-6)


def test_what_nobody_sees_may_be_anything():
    """NaN in a stranger's page, and behind a row's last slot: of no weight, and NaN times that would be NaN."""
    random = np.random.default_rng(0)
    clean = [random.normal(size=(6, KV_HEADS, PAGE, SIZE)).astype(np.float32) for _ in range(2)]
    query = jnp.asarray(random.normal(size=(2, 1, HEADS, SIZE)), jnp.float32)
    table, limit = jnp.array([[1, 0, 0], [2, 3, 4]], jnp.int32), jnp.array([[4], [18]], jnp.int32)
    dirty = [x.copy() for x in clean]
    for x in dirty:
        x[[0, 5]], x[1, :, 5:], x[4, :, 3:] = np.nan, np.nan, np.nan
    found, expected = (
        over_pages(query, Pages(*map(jnp.asarray, stored)), table, limit, page=PAGE, first=jnp.int32(0)).finish(query.dtype)
        for stored in (dirty, clean)
    )
    assert_allclose(found, expected)


def test_tokens_go_where_they_are_sent():
    """Into pages and slots, of a device's part those that lie there, and nowhere for page N."""
    pages = Pages(*(jnp.zeros((4, 1, 4, 2)) for _ in range(2)))
    new = jnp.broadcast_to(jnp.arange(1.0, 9.0).reshape(2, 1, 4, 1), (2, 1, 4, 2))
    page_BT, slot_BT = jnp.array([[0, 0, 3, 4], [1, 4, 2, 2]]), jnp.array([[4, 7, 5, 6], [3, 5, 6, 8]])
    written = write_tokens(pages, Keys(new, -new, slot_BT), page_BT, slot_BT, jnp.int32(4))
    expected = np.zeros((4, 4))
    expected[0, 0], expected[0, 3], expected[3, 1], expected[2, 2] = 1, 2, 3, 7
    assert_allclose(written.key_NKPd[:, 0, :, 0], expected)
    assert_allclose(written.value_NKPd, -written.key_NKPd)


@pytest.mark.parametrize(("platform", "kernel"), [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize("tokens", [1, 8, 9, 8192])
def test_an_accelerator_is_given_a_kernel(platform, kernel, tokens):
    """For a piece of a prompt as for a token. By blocks of operations eight prompts of 8,192 tokens took 45,262 launches on a GPU."""
    query = jax.ShapeDtypeStruct((1, tokens, 40, 128), jnp.bfloat16)
    pages = Pages(*[jax.ShapeDtypeStruct((256, 8, 512, 128), jnp.bfloat16)] * 2)
    table, limit = jax.ShapeDtypeStruct((1, 256), jnp.int32), jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    look = jax.jit(functools.partial(attend_pages, page=512, first=jnp.int32(0)))
    with on_an_h200() if platform == "cuda" else contextlib.nullcontext():
        text = look.trace(query, pages, table, limit).lower(lowering_platforms=(platform,)).as_text()
    merged = platform == "cuda" and tokens < 100  # many programs share a row's slots
    assert text.count(f"custom_call @{kernel}") == 1 + merged
    assert "stablehlo.while" not in text
