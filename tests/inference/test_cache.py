"""The cache: as long as each layer can see and no longer, right however its tokens come in."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maverick_jax.config import Config
from maverick_jax.inference import steps
from maverick_jax.inference.cache import KVCache, make_pages, page_size
from maverick_jax.model import get_abstract_model
from maverick_jax.model.attention import Piece
from maverick_jax.model.compiled import take_apart
from maverick_jax.model.llama4 import identity
from maverick_jax.ops.attention import Keys
from maverick_jax.ops.paged_attention import write_tokens
from maverick_jax.ops.pages import held
from oracle.plain import plain_model
from oracle.programs import arrays_made

CHUNK, ROOM = 8, 32


def small_config(**sizes):
    """A layer with RoPE, then one without."""
    values = dict(num_hidden_layers=2, moe_layers=(), nope_layers=(1,), attention_chunk_size=CHUNK, num_attention_heads=1)
    return dataclasses.replace(Config.maverick().text, **{**values, "num_key_value_heads": 1, "head_dim": 2, **sizes})


def test_a_million_tokens_of_maverick_take_49_gib():
    """12 layers keep everything (48 GiB), 36 one chunk (1.125 GiB); 192 GiB if all kept everything."""
    cache = jax.eval_shape(lambda: KVCache.create(Config.maverick().text, 1, 1048576, jnp.bfloat16))
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)) == 49.125 * 2**30


def test_pages_are_a_chunk_or_the_whole_context():
    """RoPE layers have `chunk` slots for each row, NoPE layers pages for all, and no row is longer than the context."""
    cache = KVCache.create(small_config(), 3, ROOM, jnp.float32)
    assert [layer.key_NKPd.shape for layer in cache.layers] == [(3, 1, CHUNK, 2), (3 * 4, 1, CHUNK, 2)]
    assert [layer.key_NKPd.shape for layer in KVCache.create(small_config(), 3, 5, jnp.float32).layers] == [(3, 1, 5, 2)] * 2
    assert cache.nbytes == 2 * 4 * 3 * 2 * (CHUNK + ROOM)


@pytest.mark.parametrize(
    "chunk, length, expected", [(8192, 10**6, 512), (8192, 300, 300), (8192, 5000, 512), (12, 64, 12), (1030, 4096, 206)]
)
def test_a_chunk_is_whole_pages(chunk, length, expected):
    """Where a chunk ends a page ends, so that pages before a border can be shared whole."""
    page = page_size(small_config(attention_chunk_size=chunk), length)
    assert page == expected
    assert length <= chunk or chunk % page == 0


WIDTH = 11


@functools.partial(jax.jit, static_argnums=1)
def append(cache, layer, held_BT, piece):
    """What a layer's pages hold before and after a piece, and what each of its tokens may see of either."""
    rows = cache.rows()[layer]
    key = jnp.broadcast_to(held_BT[:, None, :, None], (*held_BT.shape[:1], 1, held_BT.shape[1], 2))
    written = write_tokens(rows.pages, Keys(key, key, piece.positions_BT), *rows.places(piece), jnp.int32(0))
    before, after = (pages.key_NKPd[rows.table_BJ, 0, :, 0].reshape(held_BT.shape[0], -1) for pages in (rows.pages, written))
    return written, (before, rows.seen_before(piece, piece.start_B)), (after, rows.seen_after(piece))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, WIDTH), st.integers(0, WIDTH)), min_size=1, max_size=7), st.booleans())
def test_pieces_of_any_lengths_leave_the_keys_in_reach(pieces, mixed):
    """Pieces across chunk borders, longer than a chunk, or empty for one row: each query finds the keys of its chunk, or all.

    A key holds its own position (and padding a wrong one), so a slot that was overwritten too early, or by padding, shows. The pages of the
    two rows lie among each other.
    """
    cache = KVCache.create(small_config(), 2, ROOM, jnp.float32)
    if mixed:
        cache = dataclasses.replace(cache, place_B=cache.place_B[::-1], table_BJ=cache.table_BJ.T.reshape(2, -1)[::-1])
    start = np.zeros(2, np.int32)
    for lengths in pieces:
        lengths = np.minimum(lengths, ROOM - start).astype(np.int32)
        piece = Piece.of(jnp.asarray(start), jnp.asarray(lengths), WIDTH)
        real, positions = np.asarray(piece.real_BT), np.asarray(piece.positions_BT)
        layers = []
        for layer, chunk in ((0, CHUNK), (1, ROOM)):
            written, before, after = append(cache, layer, jnp.asarray(np.where(real, positions, -99), jnp.float32), piece)
            layers.append(written)
            for row, token in zip(*np.nonzero(real), strict=True):
                query, begins = int(positions[row, token]), int(start[row])
                chunk_start = query // chunk * chunk
                slots, limit = (np.asarray(x) for x in before)
                seen = slots[row, : limit[row, token] + 1].tolist()
                assert seen == list(range(chunk_start, begins)), f"layer {layer}, row {row}, query {query}, before"
                if begins // chunk == (begins + lengths[row] - 1) // chunk:  # within a chunk it may look after it is written
                    slots, limit = (np.asarray(x) for x in after)
                    assert slots[row, : limit[row, token] + 1].tolist() == list(range(chunk_start, query + 1))
            assert (np.asarray(before[1])[~real] == -1).all()
            assert (np.asarray(after[1])[~real] == -1).all()
        start = start + lengths
        cache = dataclasses.replace(cache, layers=tuple(layers), lengths_B=jnp.asarray(start))


def test_no_slot_is_written_twice():
    """Of a piece longer than the chunk only the last tokens are written: which of two writes wins no accelerator promises."""
    piece = Piece.of(jnp.array([3, 6], jnp.int32), jnp.array([WIDTH, 4], jnp.int32), WIDTH)
    rows = KVCache.create(small_config(), 2, ROOM, jnp.float32).rows()[0]
    page_BT, slot_BT = (np.asarray(x) for x in rows.places(piece))
    for row, last in enumerate((range(6, 14), range(6, 10))):
        kept = page_BT[row] < 2
        assert (page_BT[row][kept] == row).all()
        assert slot_BT[row][kept].tolist() == [position % CHUNK for position in last]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_decoding_copies_no_page():
    """New keys go into the donated pages in place, in the very program that the engine runs, token after token: one copy per
    layer would double what a step writes, or worse."""
    context = 4096
    sizes = dict(hidden_size=64, intermediate_size_mlp=64, head_dim=64, vocab_size=128, attention_chunk_size=context)
    config = Config(text=small_config(**sizes))
    structure, leaves = take_apart(get_abstract_model(config, dtype="float32"))
    geometry = steps.Geometry.of(config.text, 2, context)
    state, token_S = jax.eval_shape(lambda: steps.create(config.text, geometry, "float32", identity))
    table_SJ, draft_BD, rows_BC = (
        jax.ShapeDtypeStruct(x, jnp.int32) for x in ((2, geometry.stretches), (2, 0), (2, len(steps.Call._fields)))
    )
    compiled = steps.decode.lower(structure, geometry, leaves, state, table_SJ, token_S, draft_BD, rows_BC).compile()
    pages_of_a_layer = 2 * context * 64 * 4
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < pages_of_a_layer
    assert memory.alias_size_in_bytes >= 4 * pages_of_a_layer, "the cache that comes out is not the one that went in"


def test_a_cpu_widens_no_page():
    """Up to jax 0.10 XLA:CPU writes one bfloat16 key by way of the whole pool in float32: it holds the bits as integers instead."""
    sizes = dict(hidden_size=64, intermediate_size_mlp=64, head_dim=64, vocab_size=128, attention_chunk_size=1024)
    config = Config(text=small_config(**sizes))
    structure, leaves = take_apart(get_abstract_model(config, dtype="bfloat16"))
    geometry = steps.Geometry.of(config.text, 2, 2048)
    dtype = held("bfloat16", cpu=True).name
    state, token_S = jax.eval_shape(lambda: steps.create(config.text, geometry, dtype, identity))
    table_SJ, draft_BD, rows_BC = (
        jax.ShapeDtypeStruct(x, jnp.int32) for x in ((2, geometry.stretches), (2, 0), (2, len(steps.Call._fields)))
    )
    compiled = steps.decode.lower(structure, geometry, leaves, state, table_SJ, token_S, draft_BD, rows_BC).compile()
    pools = {pages.key_NKPd.shape for pages in state.layers}
    assert {made.dtype for made in arrays_made(compiled) if made.shape in pools} <= {"u16"}


def test_a_copy_moves_a_place_and_a_page():
    """What a place holds in the layers with chunks, and one page of the others; everything else stays."""
    config = small_config()
    geometry = steps.Geometry.of(config, 3, ROOM)
    state, _ = steps.create(config, geometry, "float32", identity)
    layers = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), state.layers)
    before = jax.tree.map(np.asarray, layers)
    state = steps.copy(geometry, dataclasses.replace(state, layers=layers), np.array([0, 2], np.int32), np.array([5, 7], np.int32))
    for layer, (source, target) in enumerate(((0, 2), (5, 7))):
        for now, then in zip(*map(jax.tree.leaves, (state.layers[layer], before[layer])), strict=True):
            expected = then.copy()
            expected[target] = then[source]
            np.testing.assert_array_equal(now, expected)


def test_whole_chunks_attend_among_themselves():
    """In a layer with chunks, where every row begins one: not over pages, as keys in 8 bits show, which are off by a hundredth."""
    text = dict(num_hidden_layers=1, nope_layers=(), moe_layers=(), attention_chunk_size=16)
    model = plain_model(**text)
    x_BTD = model.embed(np.random.default_rng(0).integers(4, 40, (2, 48)))
    expected, _, _ = model.hidden(x_BTD)

    def error(*lengths: tuple[int, int]) -> float:
        """Of the last piece, in which each row has so many tokens, up to 16."""
        cache = KVCache.create(model.config.text, 2, 64, jnp.float32)
        cache = dataclasses.replace(cache, layers=make_pages(model.config.text, 2, 2 * 64 // cache.page, 64, cache.page, jnp.int8))
        start_B = np.zeros(2, int)
        for length_B in map(np.array, lengths):
            piece = np.stack([np.resize(np.asarray(x_BTD[row, at : at + 16]), (16, x_BTD.shape[2])) for row, at in enumerate(start_B)])
            out, cache, _ = model.hidden(jnp.asarray(piece), jnp.asarray(length_B, jnp.int32), cache, within_chunk=True)
            off = [
                np.abs(out[row, :n] - expected[row, at : at + n]).max(initial=0)
                for row, (at, n) in enumerate(zip(start_B, length_B, strict=True))
            ]
            start_B += length_B
        return max(off)

    assert error((16, 16), (16, 16)) < 1e-5
    assert error((16, 16), (16, 7), (16, 0)) < 1e-5  # a row without tokens is none
    assert 1e-4 < error((4, 16), (12, 16)) < 5e-2  # one of them is inside of its chunk
