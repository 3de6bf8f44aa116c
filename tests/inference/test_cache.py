"""The cache: as long as each layer can see and no longer, right however its tokens come in."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from maverick_jax.config import Config
from maverick_jax.inference import generate as generation
from maverick_jax.inference.cache import KVCache
from maverick_jax.inference.sampling import RowSampling, Sampling
from maverick_jax.model import get_abstract_model
from maverick_jax.model.attention import Piece
from maverick_jax.ops.attention import Keys, write_slots

CHUNK, ROOM = 8, 32


def small_config():
    """A layer with RoPE, then one without."""
    sizes = dict(num_hidden_layers=2, moe_layers=(), nope_layers=(1,), attention_chunk_size=CHUNK)
    return dataclasses.replace(Config.maverick().text, num_attention_heads=1, num_key_value_heads=1, head_dim=2, **sizes)


def test_a_million_tokens_of_maverick_take_49_gib():
    """12 layers keep everything (48 GiB), 36 one chunk (1.125 GiB); 192 GiB if all kept everything."""
    cache = jax.eval_shape(lambda: KVCache.create(Config.maverick().text, 1, 1048576, jnp.bfloat16))
    buffers = [buffer for layer in cache.layers for buffer in (layer.key_BKSd, layer.value_BKSd)]
    assert sum(math.prod(b.shape) * b.dtype.itemsize for b in buffers) == 49.125 * 2**30


def test_buffers_are_a_chunk_or_the_whole_context():
    """RoPE layers have `chunk` slots, NoPE layers all, and no buffer is longer than the context."""
    cache = KVCache.create(small_config(), 3, ROOM, jnp.float32)
    assert [layer.key_BKSd.shape for layer in cache.layers] == [(3, 1, CHUNK, 2), (3, 1, ROOM, 2)]
    assert [layer.key_BKSd.shape[2] for layer in KVCache.create(small_config(), 3, 5, jnp.float32).layers] == [5, 5]
    assert cache.nbytes == 2 * 4 * 3 * 2 * (CHUNK + ROOM)


@pytest.fixture(scope="module", params=["after", "before"])
def append(request):
    """One token looks at the buffer after it is written, or at what was there before and at itself."""

    @functools.partial(jax.jit, static_argnums=1)
    def append(cache, layer, key, piece):
        layer, new = cache.layers[layer], Keys(key, key, piece.positions_BT)
        written, seen = layer.append(new, piece, write_slots)
        return written, [layer.before(piece), new] if request.param == "before" and key.shape[2] == 1 else seen

    return append


WIDTH = 11


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, WIDTH), st.integers(0, WIDTH)), min_size=1, max_size=7), st.integers(0, 3))
def test_pieces_of_any_lengths_leave_the_keys_in_reach(append, pieces, single):
    """Pieces across chunk borders, longer than a chunk, or empty for one row: each query finds the keys of its chunk, or all.

    A key holds its own position (and padding a wrong one), so a slot that was overwritten too early, or by padding, shows.
    """
    cache = KVCache.create(small_config(), 2, ROOM, jnp.float32)
    start = np.zeros(2, np.int32)
    for lengths, width in [(lengths, WIDTH) for lengths in pieces] + [((1, 1), 1)] * single:
        lengths = np.minimum(lengths, ROOM - start).astype(np.int32)
        piece = Piece.of(jnp.asarray(start), jnp.asarray(lengths), width)
        held = np.where(np.asarray(piece.real_BT), np.asarray(piece.positions_BT), -99)
        key = jnp.broadcast_to(jnp.asarray(held, jnp.float32)[:, None, :, None], (2, 1, width, 2))
        layers = []
        for layer, chunk in ((0, CHUNK), (1, ROOM)):
            new, seen = append(cache, layer, key, piece)
            keys = np.concatenate([part.key_BKSd for part in seen], axis=2)
            positions = np.concatenate([part.positions_BS for part in seen], axis=1)
            layers.append(new)
            for row in range(2):
                for query in range(start[row], start[row] + lengths[row]):
                    in_reach = [slot for slot, p in enumerate(positions[row]) if 0 <= p <= query and p // chunk == query // chunk]
                    found = sorted(keys[row, 0, in_reach, 0].tolist())
                    assert found == list(range(query // chunk * chunk, query + 1)), f"layer {layer}, row {row}, query {query}"
        start = start + lengths
        cache = cache.advanced(tuple(layers), jnp.asarray(start))


def test_no_slot_is_written_twice():
    """Of a piece longer than the buffer only the last tokens are written: which of two writes wins no accelerator promises."""
    written = []

    def write(buffer, new, slots):
        written.extend(np.asarray(slots).tolist())
        return buffer

    piece = Piece.of(jnp.array([3, 6], jnp.int32), jnp.array([WIDTH, 4], jnp.int32), WIDTH)
    layer = dataclasses.replace(KVCache.create(small_config(), 2, ROOM, jnp.float32).layers[0], fresh=False)
    key = jnp.zeros((2, 1, WIDTH, 2))
    layer.append(Keys(key, key, piece.positions_BT), piece, write)
    for slots, last in zip(written, (range(6, 14), range(6, 10)) * 2, strict=True):
        assert [slot for slot in slots if slot < CHUNK] == [position % CHUNK for position in last]


def test_decoding_copies_no_buffer():
    """New keys go into the donated buffers in place, in the very program that `generate` runs, token after token: one copy per
    layer would double what a step writes, or worse."""
    context = 4096
    sizes = dict(hidden_size=64, intermediate_size_mlp=64, head_dim=64, vocab_size=128, attention_chunk_size=context)
    config = Config(text=dataclasses.replace(small_config(), **sizes))
    graphdef, weights = nnx.split(get_abstract_model(config, dtype="float32"))
    cache = jax.eval_shape(lambda: KVCache.create(config.text, 2, context, jnp.float32))
    cache = dataclasses.replace(cache, layers=tuple(dataclasses.replace(layer, fresh=False) for layer in cache.layers))
    int_B, scalar = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    load_ME = jax.ShapeDtypeStruct((0, config.text.num_local_experts), jnp.int32)
    state = generation.DecodeState(cache, int_B, jax.ShapeDtypeStruct((2,), jnp.bool), scalar, load_ME, scalar)
    sampling, stop_ids = RowSampling.repeat(Sampling(), 2), np.zeros(3, np.int32)
    compiled = generation._decode.lower(graphdef, weights, state, sampling, stop_ids, np.int32(generation.STEPS)).compile()
    one_buffer = 2 * context * 64 * 4
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < one_buffer
    assert memory.alias_size_in_bytes >= 4 * one_buffer, "the cache that comes out is not the one that went in"
