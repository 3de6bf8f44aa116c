"""Continue prompts: prefill in padded pieces, then a jitted loop that decodes several tokens per call.

Shape suffixes: B batch, T tokens of a piece, D model width, V vocabulary, M mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from maverick_jax.errors import UserError
from maverick_jax.inference.cache import KVCache, new_cache
from maverick_jax.inference.checks import MAX_NEW_TOKENS, check_room, names_the_nearest, shown, stop_tokens, token_rows
from maverick_jax.inference.clock import seconds_compiling
from maverick_jax.inference.not_finite import explain
from maverick_jax.inference.sampling import NOT_FINITE, RowSampling, Sampling, sample
from maverick_jax.inference.sizes import longest_piece, next_power_of_two, piece_size, round_up_context
from maverick_jax.model import Llama4
from maverick_jax.model.inputs import check_patches, tiles_of

TILES_AT_ONCE = 16  # pictures' tiles per call of the vision tower
STEPS = 8  # tokens per decode call: text arrives in small portions, the host is asked rarely
NO_TOKEN = -1  # behind the end of a row


@names_the_nearest
def generate(
    model: Llama4,
    prompts: Sequence[Sequence[int]],
    *,
    tiles: np.ndarray | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts.

    Args:
      prompts: token ids per row, lists or arrays of whole numbers; rows may differ in length.
      tiles: [N, 3, S, S] float32, the tiles of all pictures of all rows, in order.
      max_new_tokens: at most so many tokens per row.
      temperature, top_k, top_p, min_p, seed: see `Sampling`.
      stop_ids: token, or tokens, that end a row; None takes the config's, `()` never stops early.

    Returns:
      The new tokens of every row, without the stop token.

    Raises:
      UserError: an argument of another type or outside its range, an empty prompt, ids outside the vocabulary, no room in the
        context, tiles that do not fit the prompts; logits that are not finite (it names the first layer that is not).
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    run = Generation(model, prompts, tiles=tiles, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids)
    for _ in run:
        pass
    return run.rows


def check_model(model: Any) -> None:
    """The name of a directory is not yet a model."""
    if not isinstance(model, Llama4):
        raise UserError(f"model is {shown(model)}: open it with maverick_jax.load.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What travels from one decode call to the next, on the devices.

    Attributes:
      cache: keys and values of everything but `token_B`.
      token_B: [B] int32 the newest token of every row, not yet in the cache.
      done_B: [B] bool rows that met a stop token.
      step: [] int32 tokens sampled per row.
      load_ME: [M, E] int32 tokens that each expert of each mixture has computed. In a prefill the last layer computes
        only the last token of every row.
      dropped: [] int32 tokens that found no room at their expert: 0.
    """

    cache: KVCache
    token_B: jax.Array
    done_B: jax.Array
    step: jax.Array
    load_ME: jax.Array
    dropped: jax.Array


class Generation:
    """A batch of prompts being continued: iterate, once, to get each row's new tokens as they come.

    After the iteration `rows` holds them all, `seconds` the times of prefill and decode, `load_ME` [MoE layers, experts] how
    many tokens went to which expert (see `DecodeState`) and `dropped` how many found no room. Arguments and errors as for
    `generate`.
    """

    def __init__(
        self,
        model: Llama4,
        prompts: Sequence[Sequence[int]],
        *,
        tiles: np.ndarray | None = None,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: int | Sequence[int] | None = None,
    ):
        check_model(model)
        config = model.config
        self.model = model
        self.max_new_tokens = MAX_NEW_TOKENS.check("max_new_tokens", max_new_tokens)
        self.stop_ids = np.array(config.eos_token_id, np.int32) if stop_ids is None else stop_tokens(stop_ids, config.text.vocab_size)
        self.prompts = token_rows(prompts, config.text.vocab_size)
        check_room(self.prompts, self.max_new_tokens, config.text)
        self.tiles = None if tiles is None else tiles_of(tiles, config.vision)
        check_patches(np.concatenate([[], *self.prompts]) == config.image_token_index, self.tiles, config.vision)
        if not isinstance(sampling, Sampling | None):
            raise UserError(f"sampling is {shown(sampling)}: give a maverick_jax.Sampling.")
        self.sampling = RowSampling.repeat(sampling or Sampling(), len(self.prompts))
        self.rows: list[list[int]] = [[] for _ in self.prompts]
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self.new_tokens = self.first_tokens = 0
        self.load_ME = np.zeros((len(config.text.moe_layers), config.text.num_local_experts), np.int32)
        self.dropped = 0
        self._iterated = False

    def __repr__(self) -> str:
        prompts = f"{len(self.prompts)} prompt{'s' * (len(self.prompts) != 1)}"
        return f"Generation({prompts} of {self.prompt_tokens:,} tokens, {self.new_tokens:,} new, {self.decode_rate:.1f} tokens/s)"

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def decode_rate(self) -> float:
        """New tokens per second of decoding, all rows together; the first of each row comes from the prefill."""
        decoded = self.new_tokens - self.first_tokens
        return decoded / self.seconds["decode"] if decoded > 0 else 0.0

    def __iter__(self) -> Iterator[list[list[int]]]:
        if self._iterated:  # `rows`, `seconds` and the loads are those of one run
            raise UserError("this Generation has been iterated before: its tokens are in `rows`; make another one to run again.")
        self._iterated = True
        return self._portions()

    def _portions(self) -> Iterator[list[list[int]]]:
        if not self.prompts:
            return
        graphdef, weights = nnx.split(self.model)
        with self._timed("prefill"):
            cache, last_BD, load_ME, dropped = self._prefill(graphdef, weights)
            state, first_B = _start(graphdef, weights, cache, last_BD, load_ME, dropped, self.sampling, self.stop_ids)
            portion = self._portion(np.asarray(first_B)[:, None], state)
        self.first_tokens = self.new_tokens
        yield portion
        left = self.max_new_tokens - 1
        while left > 0 and not np.asarray(state.done_B).all():
            with self._timed("decode"):
                state, tokens_BS = _decode(graphdef, weights, state, self.sampling, self.stop_ids, np.int32(min(STEPS, left)))
                portion = self._portion(np.asarray(tokens_BS), state)  # reads the tokens: no two calls are ever in flight
            left -= STEPS
            yield portion

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        compiling = seconds_compiling(started)
        self.seconds["compile"] += compiling
        self.seconds[phase] += time.perf_counter() - started - compiling

    def _portion(self, tokens_BS: np.ndarray, state: DecodeState) -> list[list[int]]:
        """The tokens that count: neither padding behind a row's end nor the stop token itself."""
        stop = set(self.stop_ids.tolist())
        portion = [[t for t in row if t >= 0 and t not in stop] for row in tokens_BS.tolist()]
        for row, tokens in zip(self.rows, portion, strict=True):
            row += tokens
        self.new_tokens += sum(map(len, portion))
        for row in np.flatnonzero((tokens_BS == NOT_FINITE).any(axis=1)).tolist():
            raise UserError(f"the logits of prompt {row} are not finite after {len(self.rows[row])} new tokens: {self._explain(row)}")
        self.load_ME, self.dropped = np.asarray(state.load_ME), int(state.dropped)
        return portion

    def _explain(self, row: int) -> str:
        graphdef, weights = nnx.split(self.model)
        features, index = self._features(graphdef, weights)
        new = np.array(self.rows[row], np.int32)
        return explain(self.model, np.append(self.prompts[row], new), np.append(index[row], np.zeros_like(new)), features, self.tiles)

    def _prefill(self, graphdef, weights):
        lengths = np.array([len(prompt) for prompt in self.prompts])
        features, index = self._features(graphdef, weights)
        max_length = round_up_context(int(lengths.max()) + self.max_new_tokens)
        dtype = jnp.dtype(self.model.text.embedding.dtype)
        cache = new_cache(self.model.config.text, len(self.prompts), max_length, dtype, self.model.constrain)
        last_BD, load_ME, dropped = None, self.load_ME, np.int32(0)
        longest = longest_piece(len(self.prompts))
        for start in range(0, int(lengths.max()), longest):
            size = piece_size(min(longest, int(lengths.max()) - start))
            ids, feature_index = np.zeros((2, len(self.prompts), size), np.int32)
            for row, prompt in enumerate(self.prompts):
                part = prompt[start : start + size]
                ids[row, : len(part)], feature_index[row, : len(part)] = part, index[row][start : start + size]
            piece_lengths = np.clip(lengths - start, 0, size).astype(np.int32)
            cache, last_BD, load_ME, dropped = _prefill_piece(
                graphdef, weights, cache, ids, piece_lengths, features, feature_index, last_BD, load_ME, dropped
            )
            jax.block_until_ready(last_BD)
        return cache, last_BD, load_ME, dropped

    def _features(self, graphdef, weights):
        """Image features [I, D] (None without pictures), padded to a few sizes, and which feature each prompt token takes."""
        counts = np.cumsum(np.concatenate([prompt == self.model.config.image_token_index for prompt in self.prompts])) - 1
        index = np.split(np.maximum(counts, 0).astype(np.int32), np.cumsum([len(p) for p in self.prompts])[:-1])
        if self.tiles is None:
            return None, index
        features = []
        for start in range(0, len(self.tiles), TILES_AT_ONCE):
            group = np.asarray(self.tiles[start : start + TILES_AT_ONCE], np.float32)
            padded = np.zeros((min(TILES_AT_ONCE, next_power_of_two(len(group))), *group.shape[1:]), np.float32)
            padded[: len(group)] = group
            features.append(_encode_tiles(graphdef, weights, padded))
        missing = next_power_of_two(len(features)) - len(features)
        return jnp.concatenate(features + [jnp.zeros_like(features[0])] * missing), index


@functools.partial(jax.jit, static_argnums=0)
def _encode_tiles(graphdef, weights, tiles_N3SS) -> jax.Array:
    return nnx.merge(graphdef, weights).encode_tiles(tiles_N3SS)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill_piece(graphdef, weights, cache, ids_BT, lengths_B, features, index_BT, last_BD, load_ME, dropped):
    """One piece of all prompts; `last_BD` keeps the hidden state of each row's last token so far."""
    model = nnx.merge(graphdef, weights)
    newest_B1D, cache, stats = model.hidden(model.embed(ids_BT, features, index_BT), lengths_B, cache, last_only=True)
    last_BD = newest_B1D[:, 0] if last_BD is None else jnp.where(lengths_B[:, None] > 0, newest_B1D[:, 0], last_BD)
    return cache, last_BD, *_add_stats(load_ME, dropped, stats)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _start(graphdef, weights, cache, last_BD, load_ME, dropped, rows, stop_ids):
    """Sample every row's first token from the prefill's last hidden states."""
    model = nnx.merge(graphdef, weights)
    token_B = _choose(model.logits(last_BD), rows, jnp.int32(0))
    state = DecodeState(cache, token_B, _is_stop(token_B, stop_ids), jnp.int32(1), jnp.asarray(load_ME), jnp.asarray(dropped))
    return _readable(state, token_B, model.constrain)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graphdef, weights, state: DecodeState, rows: RowSampling, stop_ids, steps):
    """Up to `steps` (at most STEPS) tokens per row. Returns the state and [B, STEPS] tokens, or NO_TOKEN, NOT_FINITE."""
    model = nnx.merge(graphdef, weights)

    def more(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done_B.all()

    def one_token(carry):
        i, state, tokens_BS = carry
        x_B1D, cache, stats = model.hidden(model.embed(state.token_B[:, None]), 1 - state.done_B.astype(jnp.int32), state.cache)
        token_B = _choose(model.logits(x_B1D[:, 0]), rows, state.step)
        tokens_BS = lax.dynamic_update_slice(tokens_BS, jnp.where(state.done_B, NO_TOKEN, token_B)[:, None], (0, i))
        load_ME, dropped = _add_stats(state.load_ME, state.dropped, stats)
        done_B = state.done_B | _is_stop(token_B, stop_ids)
        return i + 1, DecodeState(cache, token_B, done_B, state.step + 1, load_ME, dropped), tokens_BS

    none = jnp.full((state.token_B.shape[0], STEPS), NO_TOKEN, jnp.int32)
    _, state, tokens_BS = lax.while_loop(more, one_token, (jnp.int32(0), state, none))
    return _readable(state, tokens_BS, model.constrain)


def _readable(state: DecodeState, tokens, constrain) -> tuple[DecodeState, jax.Array]:
    """Whole on every device what the host reads: of an array divided over several hosts, each could read only a part."""
    tokens, done_B, load_ME, dropped = (constrain(x, (None,) * x.ndim) for x in (tokens, state.done_B, state.load_ME, state.dropped))
    return dataclasses.replace(state, done_B=done_B, load_ME=load_ME, dropped=dropped), tokens


def _choose(logits_BV, rows, step):
    return sample(logits_BV, rows, jnp.broadcast_to(step, len(logits_BV))).token_B


def _is_stop(token_B, stop_ids):
    return (token_B[:, None] == stop_ids[None, :]).any(axis=1)


def _add_stats(load_ME, dropped, stats):
    if not stats:
        return load_ME, dropped
    return load_ME + jnp.stack([s.load_E for s in stats]), dropped + sum(s.dropped for s in stats)
