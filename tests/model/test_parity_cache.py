"""The cache changes nothing: prefill in pieces of any size and decoding give the logits of one full pass of transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from transformers import Llama4TextConfig

from maverick_jax.inference.cache import KVCache
from oracle.forward import TOLERANCE, cached_step, forms_for_tpu, text_ids
from oracle.pair import Pair
from oracle.port import port
from oracle.tiny_checkpoints import make_model, text_values

LENGTH, BUFFER = 53, 17


def prefill(pair: Pair, ids: np.ndarray, size: int, width: int) -> np.ndarray:
    """Logits of [B, T] ids that go in by pieces of `size`, each padded on the right to `width` (the first to BUFFER)."""
    B, T = ids.shape
    cache, parts = KVCache.create(pair.config.text, B, 64, jnp.float32), []
    for start in range(0, T, size):
        piece = ids[:, start : start + size]
        padded = np.full((B, width if start else BUFFER), 7, np.int32)
        padded[:, : piece.shape[1]] = piece
        part, cache = cached_step(pair.model, padded, np.full((B,), piece.shape[1], np.int32), cache)
        parts.append(np.asarray(part)[:, : piece.shape[1]])
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("size", range(1, 18))
def test_prefill_in_padded_pieces(tiny, size):
    """Padding of an earlier piece is never seen later, and a piece across a chunk border attends before it overwrites."""
    ids = text_ids(2, LENGTH)
    assert_allclose(prefill(tiny, ids, size, BUFFER), tiny.expected_logits(ids), atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def two_layers() -> Pair:
    """A layer that wraps round in its cache and one that keeps everything: a program per piece size compiles quickly."""
    reference = make_model(Llama4TextConfig(**text_values("maverick", num_hidden_layers=2, no_rope_layers=[1, 0])))
    return Pair(reference, port(reference))


@pytest.mark.parametrize("size", range(1, 18))
def test_prefill_in_whole_pieces(two_layers, size):
    """Pieces that fill their width exactly take another way through the cache: its writes differ for 1, some and 17 tokens."""
    ids = text_ids(2, LENGTH)
    assert_allclose(prefill(two_layers, ids, size, size), two_layers.expected_logits(ids), atol=TOLERANCE, rtol=0)


def test_one_token_at_a_time_as_on_a_tpu(two_layers):
    """There the cache is read before it is written, and the token looks at itself beside it."""
    ids = text_ids(2, LENGTH)
    with forms_for_tpu():
        ours = prefill(two_layers, ids, 1, 1)
    assert_allclose(ours, two_layers.expected_logits(ids), atol=TOLERANCE, rtol=0)


def test_pieces_of_different_lengths_per_row(tiny_maverick):
    """A row that ends within a piece keeps its own positions and slots while the others go on."""
    ids = text_ids(2, LENGTH)
    cache = KVCache.create(tiny_maverick.config.text, 2, 64, jnp.float32)
    given, rows = [0, 0], ([], [])
    for lengths in ([17, 3], [5, 17], [17, 12], [14, 17], [0, 4]):
        padded = np.full((2, BUFFER), 7, np.int32)
        for row, n in enumerate(lengths):
            padded[row, :n] = ids[row, given[row] : given[row] + n]
            given[row] += n
        part, cache = cached_step(tiny_maverick.model, padded, np.array(lengths, np.int32), cache)
        for row, n in enumerate(lengths):
            rows[row].append(np.asarray(part)[row, :n])
    assert given == [LENGTH, LENGTH] == np.asarray(cache.lengths_B).tolist()
    ours = np.stack([np.concatenate(parts) for parts in rows])
    assert_allclose(ours, tiny_maverick.expected_logits(ids), atol=TOLERANCE, rtol=0)


def test_greedy_decode_across_two_chunk_borders(tiny):
    """30 tokens from position 20 on cross 32 and 48: the chunk mask holds while decoding too (Meta's own code forgets it)."""
    ids = text_ids(2, 20)
    cache = KVCache.create(tiny.config.text, 2, 64, jnp.float32)
    for start in (0, BUFFER):
        piece = np.zeros((2, BUFFER), np.int32)
        count = min(BUFFER, 20 - start)
        piece[:, :count] = ids[:, start : start + count]
        out, cache = cached_step(tiny.model, piece, np.full(2, count, np.int32), cache)
    steps = [np.asarray(out)[:, count - 1]]
    while len(steps) < 30:
        ids = np.concatenate([ids, steps[-1].argmax(-1)[:, None]], axis=1).astype(np.int32)
        out, cache = cached_step(tiny.model, ids[:, -1:], np.ones(2, np.int32), cache)
        steps.append(np.asarray(out)[:, 0])
    ours, expected = np.stack(steps, axis=1), tiny.expected_logits(ids)[:, 19:]
    assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
    assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_a_full_cache_is_refused(tiny_maverick):
    """Writing past the end would overwrite the oldest tokens."""
    cache = KVCache.create(tiny_maverick.config.text, 1, 8, jnp.float32)
    cache = dataclasses.replace(cache, lengths_B=jnp.array([6], jnp.int32))
    with pytest.raises(ValueError, match="room for 8 tokens; 6 are in it and 3 are added"):
        tiny_maverick.model(jnp.ones((1, 3), jnp.int32), cache=cache)


@functools.partial(jax.jit, static_argnums=4)
def hidden(model, ids, lengths, cache, last_only):
    return model.hidden(model.embed(ids), lengths, cache, last_only=last_only)[:2]


def test_last_tokens_only(tiny):
    """The last layer asks for each row's last token alone; the cache and what comes out are those of the whole pass."""
    ids, lengths = text_ids(3, BUFFER), np.array([BUFFER, 0, 4], np.int32)

    def prefill_both(start: int, last_only: bool):
        cache = KVCache.create(tiny.config.text, 3, 64, jnp.float32)
        for piece_lengths in (np.array([start] * 3, np.int32), lengths) if start else (lengths,):
            x, cache = hidden(tiny.model, ids, piece_lengths, cache, last_only)
        return x, cache

    for start in (0, 9):  # what a piece sees is itself, or an older cache too
        whole, cache = prefill_both(start, False)
        last, same_cache = prefill_both(start, True)
        assert last.shape[1] == 1
        for row, length in enumerate(lengths):
            if length:
                assert_allclose(last[row, 0], whole[row, length - 1], atol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(same_cache), jax.tree.leaves(cache), strict=True):
            assert_allclose(ours, theirs, atol=1e-5)
