"""The engine's compiled programs. There are few, and their shapes come from short lists (`sizes.py`).

| program | shapes | what it does |
|---|---|---|
| `encode` | tiles at once | pictures' tiles to features |
| `embed`, `place` | rows x tokens | token ids to embeddings; a tile's features in the place of its tokens |
| `prefill` | rows x tokens, first piece or not, scored or not | a piece of some prompts into the cache, logits of each row's last \
token; how likely the prompts' tokens are |
| `decode` | rows, with a draft or not | the newest token of every row, and a draft behind it |
| `draw`, `draw_with_extras` | rows, with a draft or not, all greedy or not | logits to tokens, which stay on the device for the next step |
| `set_history` | | what a place has said so far, for penalties |
| `copy` | | what one place holds, to another |

They follow each other on the device in the order of their launch, so that a page may be given to another row as soon as the
last program that reads it is launched. What changes from call to call (places, tables, settings) is data: nothing compiles again.

Shape suffixes: B rows of a call, S places of the engine, T tokens, J stretches of a row (a page each), D model width, D tokens
of a draft too, V vocabulary, W words of a mask, C columns of `Call`, P features of a tile, M mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maverick_jax.config import TextConfig
from maverick_jax.inference.cache import KVCache, make_pages, page_size, pages_per_chunk
from maverick_jax.inference.sampling import Extras, RowExtras, RowSampling, Sampled, Scores, accept, record, score
from maverick_jax.model import Llama4
from maverick_jax.model.compiled import Structure
from maverick_jax.model.named_adapters import choose
from maverick_jax.ops.pages import Pages


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of an engine's cache, and what else is the same in all its programs.

    Attributes:
      places: rows that may be served at once.
      pages: of the pool, for the layers that see everything.
      max_length: tokens of a row.
      chunks: tokens per chunk of every layer, or None.
      page: slots of a page.
      routed: whether the programs tell which experts the tokens went to.
    """

    places: int
    pages: int
    max_length: int
    chunks: tuple[int | None, ...]
    page: int
    routed: bool = False

    @classmethod
    def of(cls, config: TextConfig, places: int, max_length: int, pages: int | None = None) -> Geometry:
        """`pages` None: as many as fill every place."""
        page = page_size(config, max_length)
        chunks = tuple(config.chunk_of_layer(i) for i in range(config.num_hidden_layers))
        return cls(places, pages or places * -(-max_length // page), max_length, chunks, page)

    @property
    def stretches(self) -> int:
        """Pages of a row of full length."""
        return -(-self.max_length // self.page)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What lives on the devices from one program to the next.

    Attributes:
      layers: the pages of every layer.
      load_ME: int32, tokens that each expert of each mixture has computed. Of a prefill the last layer computes only the last
        token of every row, unless more is asked of it.
      dropped: [] int32 tokens that found no room at their expert: 0.
    """

    layers: tuple[Pages, ...]
    load_ME: jax.Array
    dropped: jax.Array


class Drawn(NamedTuple):
    """What a call has drawn.

    Attributes:
      count_B: int32, how many tokens of each row count: those of its draft that agree, and one more.
      sampled: [B, T] tokens, and with extras their log-probabilities.
    """

    count_B: jax.Array
    sampled: Sampled


class Call(NamedTuple):
    """The rows of a call: columns of one [B, C] int32 array, since each array costs the host a transfer.

    Attributes:
      place_B: where each row lies; S for a row that is none.
      start_B: tokens that it held before.
      length_B: tokens of this call; 0 for a row that is none.
      step_B: how many tokens it has drawn before; negative: none is drawn now.
      adapter_B: which of several adapters it has, 0 for none; there is no such column where none are served.
    """

    place_B: Any
    start_B: Any
    length_B: Any
    step_B: Any
    adapter_B: Any = None

    @classmethod
    def of(cls, rows_BC: jax.Array) -> Call:
        return cls(*(rows_BC[:, i] for i in range(rows_BC.shape[1])))

    def model(self, structure: Structure, leaves: list[Any]) -> Llama4:
        """With each row's adapter."""
        return structure(leaves) if self.adapter_B is None else choose(structure(leaves), self.adapter_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def create(config: TextConfig, geometry: Geometry, dtype: str, constrain: Any) -> tuple[State, jax.Array]:
    """An empty cache, and [S] int32 newest tokens."""
    g = geometry
    layers = make_pages(config, g.places, g.pages, g.max_length, g.page, dtype, constrain)
    load_ME = jnp.zeros((len(config.moe_layers), config.num_local_experts), jnp.int32)
    return _placed(State(layers, load_ME, jnp.int32(0)), constrain), constrain(jnp.zeros((g.places,), jnp.int32), (None,))


@functools.partial(jax.jit, static_argnums=0)
def upload(constrain: Any, values: Any) -> Any:
    """The same on every device."""
    return jax.tree.map(lambda x: constrain(jnp.asarray(x), (None,) * np.ndim(x)), values)


@functools.partial(jax.jit, static_argnums=0)
def encode(structure: Structure, leaves: list[Any], tiles_N3SS: jax.Array) -> jax.Array:
    """[N, 3, S, S] -> [N, P, D]."""
    model = structure(leaves)
    features = model.encode_tiles(tiles_N3SS)
    return model.constrain(features.reshape(tiles_N3SS.shape[0], -1, features.shape[-1]), (None, None, None))


@jax.jit
def pick(features_NPD: jax.Array, tile: jax.Array) -> jax.Array:
    """[P, D] of one tile."""
    return features_NPD[tile]


@functools.partial(jax.jit, static_argnums=0)
def embed(structure: Structure, leaves: list[Any], ids_BT: jax.Array) -> jax.Array:
    return structure(leaves).embed(ids_BT)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def place(constrain: Any, x_BTD: jax.Array, features_PD: jax.Array, index_BT: jax.Array) -> jax.Array:
    """A tile's features where `index_BT` names one; negative: the embedding stays."""
    placed = jnp.where(index_BT[:, :, None] >= 0, features_PD[jnp.maximum(index_BT, 0)], x_BTD)
    return constrain(placed, ("batch", "sequence", None))


class Computed(NamedTuple):
    """What the layers have computed of a call's tokens.

    Attributes:
      state: as they leave it.
      logits_BTV: float32, of those tokens that may draw.
      expert_BTM: unsigned, which expert of each mixture every token went to; None unless the geometry says `routed`.
      scores: how likely a prompt's tokens are, if that was asked for.
    """

    state: State
    logits_BTV: jax.Array
    expert_BTM: jax.Array | None = None
    scores: Scores | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def prefill(
    structure: Structure,
    geometry: Geometry,
    first: bool,
    leaves: list[Any],
    state: State,
    table_SJ: jax.Array,
    x_BTD: jax.Array,
    rows_BC: jax.Array,
    next_BT: jax.Array | None = None,
) -> Computed:
    """A piece of each row, with the logits of its last token.

    Args:
      first: the rows hold nothing yet.
      next_BT: tokens that come behind each place, for `scores`; None: nobody asks for them.
    """
    call = Call.of(rows_BC)
    model = call.model(structure, leaves)
    last_only = next_BT is None and not geometry.routed
    state, x_BTD, expert_BTM = _hidden(model, geometry, state, table_SJ, x_BTD, call, first=first, last_only=last_only)
    scores = None if next_BT is None else _whole(model.constrain, score(model.logits, x_BTD, next_BT))
    if not last_only:
        x_BTD = jnp.take_along_axis(x_BTD, jnp.maximum(call.length_B - 1, 0)[:, None, None], axis=1)
    return Computed(state, model.logits(x_BTD), expert_BTM, scores)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    structure: Structure,
    geometry: Geometry,
    leaves: list[Any],
    state: State,
    table_SJ: jax.Array,
    token_S: jax.Array,
    draft_BD: jax.Array,
    rows_BC: jax.Array,
) -> Computed:
    """The newest token of each row, and a draft behind it, with the logits of what comes behind each."""
    call = Call.of(rows_BC)
    model = call.model(structure, leaves)
    ids_BT = jnp.concatenate([token_S[_known(call.place_B, token_S)][:, None], jnp.maximum(draft_BD, 0)], axis=1)
    state, x_BTD, expert_BTM = _hidden(model, geometry, state, table_SJ, model.embed(ids_BT), call, first=False, last_only=False)
    return Computed(state, model.logits(x_BTD), expert_BTM)


def _hidden(model, geometry, state, table_SJ, x_BTD, call, **known):
    g, place_B = geometry, _known(call.place_B, table_SJ)
    cache = KVCache(state.layers, place_B, table_SJ[place_B], call.start_B, g.max_length, g.chunks, g.page)
    hidden_BTD, cache, stats = model.hidden(x_BTD, call.length_B, cache, within_chunk=True, **known)
    load_ME, dropped, expert_BTM = state.load_ME, state.dropped, None
    if stats:
        load_ME, dropped = load_ME + jnp.stack([s.load_E for s in stats]), dropped + sum(s.dropped for s in stats)
    if stats and g.routed:
        experts = load_ME.shape[1]
        chosen = [s.expert_T.reshape(x_BTD.shape[:2]).astype(np.min_scalar_type(max(experts - 1, 0))) for s in stats]
        expert_BTM = model.constrain(jnp.stack(chosen, axis=-1), (None, None, None))
    return _placed(State(cache.layers, load_ME, dropped), model.constrain), hidden_BTD, expert_BTM


def _known(place_B, of_S):
    """A row that is none looks at the last place; it writes nowhere."""
    return jnp.minimum(place_B, of_S.shape[0] - 1)


def _placed(state, constrain):
    """As `create` laid it out, or the next call would be another program. The counts lie whole on every device: hosts read them."""
    load_ME, dropped = constrain(state.load_ME, (None, None)), constrain(state.dropped, ())
    return State(state.layers, load_ME, dropped)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def draw(
    constrain: Any, logits_BTV: jax.Array, token_S: jax.Array, settings_S: RowSampling | None, draft_BD: jax.Array, rows_BC: jax.Array
) -> tuple[jax.Array, Drawn]:
    """A token of each row, and as many of its draft as agree: the newest tokens of all places, and what is new.

    `settings_S` None: all rows of the call are greedy. A program for that alone compiles in a tenth of the time.
    """
    call = Call.of(rows_BC)
    place_B = _known(call.place_B, token_S)
    drawn = Drawn(*accept(logits_BTV, draft_BD, _rows_of(settings_S, place_B), jnp.maximum(call.step_B, 0)))
    return _newest(constrain, token_S, drawn, call), _whole(constrain, drawn)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def draw_with_extras(
    constrain: Any,
    logits_BTV: jax.Array,
    token_S: jax.Array,
    history_SV: jax.Array,
    settings_S: RowSampling | None,
    extras_S: RowExtras,
    mask_BTW: jax.Array,
    draft_BD: jax.Array,
    rows_BC: jax.Array,
) -> tuple[jax.Array, jax.Array, Drawn]:
    """As `draw`, with penalties, biases, masks and log-probabilities; the second result is what each place has said so far."""
    call = Call.of(rows_BC)
    place_B = _known(call.place_B, token_S)
    extras = Extras(_rows_of(extras_S, place_B), history_SV[place_B], mask_BTW)
    if draft_BD.shape[1] == 0:
        extras = extras._replace(mask_BW=mask_BTW[:, 0])
    drawn = Drawn(*accept(logits_BTV, draft_BD, _rows_of(settings_S, place_B), jnp.maximum(call.step_B, 0), extras))
    written_B = _drawing(call, token_S)
    for t in range(logits_BTV.shape[1]):
        history_SV = record(history_SV, written_B, jnp.where(t < drawn.count_B, drawn.sampled.token_B[:, t], -1))
    return _newest(constrain, token_S, drawn, call), constrain(history_SV, (None, None)), _whole(constrain, drawn)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def set_history(constrain: Any, history_SV: jax.Array, place: jax.Array, history_V: jax.Array) -> jax.Array:
    return constrain(history_SV.at[place].set(history_V), (None, None))


def _rows_of(settings_S, place_B):
    return jax.tree.map(lambda x: x[place_B], settings_S)


def _drawing(call, token_S):
    """[B] places that draw; S for the others."""
    return jnp.where(call.step_B >= 0, call.place_B, token_S.shape[0])


def _newest(constrain, token_S, drawn, call):
    last_B = jnp.take_along_axis(drawn.sampled.token_B, drawn.count_B[:, None] - 1, axis=1)[:, 0]
    return constrain(token_S.at[_drawing(call, token_S)].set(last_B, mode="drop"), (None,))


def _whole(constrain, drawn):
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), drawn)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def copy(geometry: Geometry, state: State, places_2: jax.Array, pages_2: jax.Array) -> State:
    """What a place holds in the layers with chunks, and a page of the others, to another place and page: (from, to) each."""

    def moved(x, source, target, count):
        return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, source, count), target, axis=0)

    layers = []
    for pages, chunk in zip(state.layers, geometry.chunks, strict=True):
        own = 1 if chunk is None else pages_per_chunk(chunk, geometry.max_length, geometry.page)
        source, target = pages_2 if chunk is None else places_2 * own
        layers.append(jax.tree.map(functools.partial(moved, source=source, target=target, count=own), pages))
    return dataclasses.replace(state, layers=tuple(layers))
