"""What the engine has on the devices, and how a plan is launched on them.

Nothing here waits for a device, but on several simulated ones. What changes with the requests (tables, settings) has a copy on
the host, and goes to the devices when it has changed.

Shape suffixes: B rows of a call, S places, T tokens, J stretches of a row, D tokens of a draft, V vocabulary, W words of a
mask, C columns of a call.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from maverick_jax.config import VisionConfig
from maverick_jax.inference import pictures, steps
from maverick_jax.inference.grammar import Matcher
from maverick_jax.inference.request import Admitted, Row
from maverick_jax.inference.room import Room
from maverick_jax.inference.sampling import RowExtras, RowSampling, Sampling, Scores, history_of
from maverick_jax.inference.scheduling.plans import Call, Copy, Part, Plan
from maverick_jax.inference.sizes import powers_of_two
from maverick_jax.model import Llama4
from maverick_jax.model.compiled import take_apart
from maverick_jax.model.named_adapters import NamedAdapters

SETTINGS = Sampling()  # of places where nobody lies
RUNS = 2  # of each program in a warm-up


@dataclasses.dataclass(eq=False, kw_only=True)
class Content:
    """What a row's tokens are, and how they are drawn.

    Attributes:
      tokens: of the prompt, and the new ones that have been read.
      tiles: a digest of each.
      feature_T: which feature each token of the prompt takes, negative: none; None without pictures.
      matcher: what its grammar allows, if it has one.
      draft: what may come next, for the next step.
      adapter: its number, 0 for none.
    """

    row: Row
    request: Admitted
    tokens: list[int]
    tiles: list[bytes]
    feature_T: np.ndarray | None
    matcher: Matcher | None = None
    draft: list[int] = dataclasses.field(default_factory=list)
    adapter: int = 0

    @property
    def has_extras(self) -> bool:
        return self.matcher is not None or self.request.sampling.has_extras

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.request.ids) :]


class Forwarded(NamedTuple):
    """A call that is launched, and may draw.

    Attributes:
      logits_BTV: float32, of each row's newest token and of its draft.
      draft_BD, rows_BC: see `steps.decode`.
      scores, expert_BTM: see `steps.Computed`; None where nobody asked.
    """

    call: Call
    logits_BTV: jax.Array
    draft_BD: np.ndarray
    rows_BC: np.ndarray
    scores: Scores | None
    expert_BTM: jax.Array | None

    @property
    def drawing(self) -> list[Part]:
        """Those of its rows for which a token is drawn; where there are none, nothing is."""
        return [part for part in self.call.parts if part.samples]


class Launched:
    """Draws that nobody has read yet."""

    def __init__(self, parts: Sequence[Part], drawn: steps.Drawn):
        self.parts, self._drawn = parts, drawn
        for x in jax.tree.leaves(drawn):
            x.copy_to_host_async()

    def read(self) -> list[tuple[Part, list[int], steps.Sampled | None]]:
        """Each row's tokens that count, and with log-probabilities all that was sampled for it. Waits for the device."""
        count_B, sampled = jax.tree.map(np.asarray, self._drawn)
        counts, tokens = count_B.tolist(), sampled.token_B.tolist()

        def of_row(i: int) -> steps.Sampled | None:
            return None if sampled.logprob_B is None else jax.tree.map(lambda x: x[i], sampled)

        return [(part, tokens[i][: counts[i]], of_row(i)) for i, part in enumerate(self.parts) if part.samples]


class Traits(NamedTuple):
    """What was asked about the tokens of a part: how likely those are that come behind them, and which experts they went to."""

    scores: Scores | None
    expert_TM: Any


class Observed:
    """Traits that nobody has read yet."""

    def __init__(self, forwarded: Forwarded):
        self.parts, self._traits = forwarded.call.parts, Traits(forwarded.scores, forwarded.expert_BTM)
        for x in jax.tree.leaves(self._traits):
            x.copy_to_host_async()

    def read(self) -> list[tuple[Part, None, Traits]]:
        """Each row's. Waits for the device."""
        traits = jax.tree.map(np.asarray, self._traits)
        return [(part, None, jax.tree.map(lambda x, i=i, n=part.length: x[i, :n], traits)) for i, part in enumerate(self.parts)]


class Runner:
    """The state on the devices, as the plans that were run have left it."""

    def __init__(self, model: Llama4, room: Room, adapters: NamedAdapters):
        self._whole, self._decoder = take_apart(model), take_apart(adapters.beside(model.decoder))
        self._columns = len(steps.Call._fields) - (not adapters.names)
        self._model, self._constrain, self._geometry = model, model.constrain, room.geometry
        places, self._vocabulary = room.geometry.places, model.config.text.vocab_size
        self.state, self._token_S = steps.create(model.config.text, room.geometry, room.dtype, model.constrain)
        self._table_SJ = np.zeros((places, room.geometry.stretches), np.int32)
        self._settings_S, self._owner_S = RowSampling.repeat(SETTINGS, places), [-1] * places
        self._extras_S: RowExtras | None = None  # until somebody asks for some
        self._history_SV: jax.Array | None = None
        self._table, self._settings = self._upload(self._table_SJ), self._upload(self._settings_S)
        self.features = pictures.Features(functools.partial(steps.encode, *self._whole), steps.pick)
        # Simulated devices share the threads of one process: with several calls in flight, each may wait in another one's collective.
        devices = self._token_S.devices()
        self._blocks = len(devices) > 1 and next(iter(devices)).platform == "cpu"

    def is_of(self, model: Llama4) -> bool:
        """Whether these are still the parameters that the model has."""
        return all(a is b for a, b in zip(jax.tree.leaves(model), self._whole[1], strict=True))

    def forward(self, plan: Plan, contents: Mapping[int, Content]) -> Iterator[Forwarded]:
        """Launch a plan, up to the logits: a call each time, that `draw` is to go on with. `contents` by the numbers of its rows."""
        for place, stretch, page in plan.table_changes:
            self._table_SJ[place, stretch] = page
        if plan.table_changes:
            self._table = self._upload(self._table_SJ)
        for copy in plan.copies:
            self._copy(copy)
        for call in plan.calls:
            forwarded = self._forward(call, contents)
            if self._blocks:
                jax.block_until_ready((self.state.dropped, forwarded.logits_BTV))
            yield forwarded

    def draw(self, forwarded: Forwarded, contents: Mapping[int, Content]) -> Launched:
        """Launch the draws; `contents` of the rows that have not ended meanwhile."""
        drawing = [contents[part.row] for part in forwarded.drawing if part.row in contents]
        extras = any(content.has_extras for content in drawing)
        if extras and self._extras_S is None:
            self._begin_extras()
        new = [content for content in drawing if self._owner_S[content.row.slot or 0] != content.row.number]
        if new:
            self._move_in(new)
        greedy = all(content.request.sampling.temperature == 0 for content in drawing)
        drawn = self._draw(forwarded, contents, greedy=greedy, extras=extras)
        if all(content.request.sampling.logprobs is None for content in drawing):
            drawn = drawn._replace(sampled=steps.Sampled(drawn.sampled.token_B))  # each array that is read costs the host a transfer
        if self._blocks:
            jax.block_until_ready(self._token_S)
        return Launched(forwarded.call.parts, drawn)

    def warm_up(self, calls: Sequence[Call], *, extras: bool) -> list[Callable[[], None]]:
        """What runs each program with rows that are none, twice: on a GPU the second run of a program is the slow one."""

        def each(call: Call) -> None:
            for greedy, with_extras in itertools.product((True, False), (False, True) if extras else (False,)):
                for _ in range(RUNS):
                    if with_extras:
                        self._begin_extras()
                    self._move_in(())
                    self._draw(self._forward(call, {}, scored=with_extras), {}, greedy=greedy, extras=with_extras)
            jax.block_until_ready(self._token_S)

        def others() -> None:
            for _ in range(RUNS):
                self._copy(Copy(None, None, 0, ()))
                self._table = self._upload(self._table_SJ)
                if self._history_SV is not None:
                    nothing_V = np.zeros(self._vocabulary, np.int32)
                    self._history_SV = steps.set_history(self._constrain, self._history_SV, np.int32(0), nothing_V)

        def picture(call: Call, vision: VisionConfig) -> None:
            """Tiles as many as the tower takes at once, and one of them into a piece."""
            shape = (vision.num_channels, vision.image_size, vision.image_size)
            tiles = [np.zeros((n, *shape), np.float32) for n in powers_of_two(pictures.TILES_AT_ONCE)]
            *_, features_PD = (steps.pick(steps.encode(*self._whole, some), 0) for some in tiles)
            index_BT = np.full((call.rows, call.tokens), -1, np.int32)
            x_BTD = steps.embed(*self._decoder, np.zeros_like(index_BT))
            jax.block_until_ready(steps.place(self._constrain, x_BTD, features_PD, index_BT))

        vision = self._model.config.vision
        with_pictures = [call for call in calls if call.kind == "prefill" and call.first]
        return [
            *(functools.partial(each, call) for call in calls),
            others,
            *(functools.partial(picture, call, vision) for call in with_pictures if vision is not None),
        ]

    def features_of(self, shown: Sequence[tuple[Content, int]]) -> list[jax.Array]:
        """[P, D] of tiles, each of some row. Those of several rows go through the vision tower together."""
        pixels = [content.request.tiles[tile] for content, tile in shown if content.request.tiles is not None]
        return self.features.of([content.tiles[tile] for content, tile in shown], pixels)

    def _upload(self, values: Any) -> Any:
        return steps.upload(self._constrain, values)

    def _copy(self, copy: Copy) -> None:
        places = [0, 0] if copy.source is None else [copy.source, copy.target]
        for pages in copy.pages or ((0, 0),):
            self.state = steps.copy(self._geometry, self.state, np.array(places, np.int32), np.array(pages, np.int32))
            places = [0, 0]

    def _forward(self, call: Call, contents: Mapping[int, Content], *, scored: bool = False) -> Forwarded:
        """`scored`: with scores though nobody asks for them."""
        nobody = (self._geometry.places, 0, 0, -1, 0)
        rows = [(part.slot, part.start, part.length, part.step if part.samples else -1, contents[part.row].adapter) for part in call.parts]
        rows_BC = np.array(rows + [nobody] * (call.rows - len(rows)), np.int32)[:, : self._columns]
        draft_BD = np.full((call.rows, call.tokens - 1 if call.kind == "decode" else 0), -1, np.int32)
        structure, leaves = self._decoder
        common, requests = (leaves, self.state, self._table), [contents[part.row].request for part in call.parts]
        if call.kind == "decode":
            for i, part in enumerate(call.parts if call.tokens > 1 else ()):
                draft_BD[i, : part.length - 1] = contents[part.row].draft[: part.length - 1]
            computed = steps.decode(structure, self._geometry, *common, self._token_S, draft_BD, rows_BC)
        else:
            x_BTD = self._embedded(call, contents)
            scored = scored or any(request.prompt_logprobs is not None for request in requests)
            next_BT = self._ids(call, contents, 1) if scored else None
            computed = steps.prefill(structure, self._geometry, call.first, *common, x_BTD, rows_BC, next_BT)
        self.state = computed.state
        routed = any(request.routed_experts_prompt_start is not None for request in requests)
        return Forwarded(call, computed.logits_BTV, draft_BD, rows_BC, computed.scores, computed.expert_BTM if routed else None)

    def _ids(self, call: Call, contents: Mapping[int, Content], ahead: int = 0) -> np.ndarray:
        """[B, T] tokens of a prefill's pieces, or those so many places ahead."""
        ids_BT = np.zeros((call.rows, call.tokens), np.int32)
        for i, part in enumerate(call.parts):
            tokens = contents[part.row].tokens[part.start + ahead : part.start + ahead + part.length]
            ids_BT[i, : len(tokens)] = tokens
        return ids_BT

    def _embedded(self, call: Call, contents: Mapping[int, Content]) -> jax.Array:
        """[B, T, D] of a prefill's pieces, their pictures' features among them."""
        ids_BT = self._ids(call, contents)
        x_BTD = steps.embed(*self._decoder, ids_BT)
        shown = [shown for i, part in enumerate(call.parts) for shown in self._shown(i, part, contents[part.row], ids_BT.shape)]
        for (_, _, index_BT), features_PD in zip(shown, self.features_of([(content, tile) for content, tile, _ in shown]), strict=True):
            x_BTD = steps.place(self._constrain, x_BTD, features_PD, index_BT)
        return x_BTD

    def _shown(self, row: int, part: Part, content: Content, shape: tuple[int, int]) -> Iterator[tuple[Content, int, np.ndarray]]:
        """The tiles that a part of a call shows: each with [B, T] which feature of it every token is, or -1."""
        if content.feature_T is None:
            return
        assert self._model.config.vision is not None
        per_tile = self._model.config.vision.tokens_per_tile
        feature_t = content.feature_T[part.start : part.start + part.length]
        for tile in np.unique(feature_t[feature_t >= 0] // per_tile).tolist():
            index_BT = np.full(shape, -1, np.int32)
            index_BT[row, : len(feature_t)] = np.where(feature_t // per_tile == tile, feature_t - tile * per_tile, -1)
            yield content, tile, index_BT

    def _draw(self, forwarded: Forwarded, contents: Mapping[int, Content], *, greedy: bool, extras: bool) -> steps.Drawn:
        _, logits_BTV, draft_BD, rows_BC, *_ = forwarded
        settings = None if greedy else self._settings
        if not extras:
            self._token_S, drawn = steps.draw(self._constrain, logits_BTV, self._token_S, settings, draft_BD, rows_BC)
            return drawn
        mask_BTW = self._masks(forwarded, contents)
        given = (settings, self._extras, mask_BTW, draft_BD, rows_BC)
        self._token_S, self._history_SV, drawn = steps.draw_with_extras(
            self._constrain, logits_BTV, self._token_S, self._history_SV, *given
        )
        return drawn

    def _begin_extras(self) -> None:
        """From here on every place has some, if only none."""
        self._extras_S = RowExtras.repeat(SETTINGS, self._geometry.places)
        self._history_SV = self._upload(np.zeros((self._geometry.places, self._vocabulary), np.int32))
        self._owner_S = [-1] * self._geometry.places

    def _masks(self, forwarded: Forwarded, contents: Mapping[int, Content]) -> np.ndarray:
        """[B, T, W] what may come behind each token; made while the device computes the logits."""
        tokens, words = forwarded.logits_BTV.shape[1], -(-self._vocabulary // 32)
        masks_BTW = np.full((forwarded.call.rows, tokens, words), 2**32 - 1, np.uint32)
        rows = [(contents[part.row], i, part) for i, part in enumerate(forwarded.call.parts) if part.samples and part.row in contents]
        held = [(c.matcher, i * tokens, c.draft[: part.length - 1] if tokens > 1 else ()) for c, i, part in rows if c.matcher is not None]
        if held:
            held[0][0].grammars.fill(held, masks_BTW.reshape(-1, words))
        return masks_BTW

    def _move_in(self, contents: Sequence[Content]) -> None:
        """Settings of rows that draw for the first time where they lie."""
        for content in contents:
            row = content.row
            assert row.slot is not None
            self._owner_S = [-1 if owner == row.number else owner for owner in self._owner_S]  # where it was, what it says now is missing
            self._owner_S[row.slot] = row.number
            sampling = content.request.sampling
            _set(self._settings_S, row.slot, RowSampling.repeat(sampling, 1))
            if self._extras_S is not None:
                _set(self._extras_S, row.slot, RowExtras.repeat(sampling, 1, sorted(content.request.stop_ids)))
                history_V = history_of(content.request.ids, content.new, self._vocabulary)
                self._history_SV = steps.set_history(self._constrain, self._history_SV, np.int32(row.slot), history_V)
        self._settings = self._upload(self._settings_S)
        if self._extras_S is not None:
            self._extras = self._upload(self._extras_S)


def _set(rows_S: Any, place: int, one: Any) -> None:
    for x_S, x_1 in zip(jax.tree.leaves(rows_S), jax.tree.leaves(one), strict=True):
        x_S[place] = x_1[0]
