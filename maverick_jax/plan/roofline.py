"""How fast a step can be at most: bytes, products and links of one device, each at the chip's full rate.

Nothing here is a forecast. Real steps reach a part of every rate; a step can never be faster than its slowest resource.
Source of the method: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from maverick_jax.plan.case import Case, Ways
from maverick_jax.plan.memory import prefill_piece, prefill_rows
from maverick_jax.plan.weights import ATTENTION, DENSE, EMBEDDING, ROUTED, SHARED, SMALL, UNEMBEDDING, VISION, itemsize
from maverick_jax.sharding.attend import KEYS

# Kernels, copies and collectives of a decode step that XLA:GPU compiles: those beside the layers, of a dense layer, of a mixture, and of
# one whose tokens travel to their experts. Counted in the texts for eight H200s, with one row; with 64 there are 7 % more.
BESIDE_LAYERS, DENSE_LAYER, MIXTURE, TRAVELLING = 7, 15, 26, 57
# What a launch takes beyond the bytes it moves: of 1,399 µs that a step of one row took on an H200, 1,075 were those of its bytes, and
# it had 139 launches.
LAUNCH_SECONDS = 2.3e-6


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in a step.

    Attributes:
      read: bytes from its memory, by what is read.
      products: floating-point operations, by component ("scores": queries times keys, and weights times values).
      sent: bytes over its links in one direction, by collective.
      crossed: bytes to other hosts in one direction, by collective; a part of the devices' exchange that `sent` does not count.
      collectives: how many there are; what starting one takes is not in `seconds`.
      launches: about how many of a decode step on GPUs; 0 elsewhere. What they take is not in `seconds` either.
      seconds: of memory, compute, links and, with several hosts, network, each alone.
      distinct: experts of a mixture layer that the whole batch hits.
    """

    read: dict[str, float]
    products: dict[str, float]
    sent: dict[str, float]
    crossed: dict[str, float]
    collectives: int
    launches: int
    seconds: dict[str, float]
    distinct: float

    @property
    def step(self) -> float:
        """Seconds if all of them overlap perfectly: the limit."""
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        """Seconds if nothing overlaps."""
        return sum(self.seconds.values())

    @property
    def binds(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def distinct_experts(experts: int, tokens: float) -> float:
    """Expected distinct experts among `tokens` that each choose one of `experts` uniformly: E (1 - (1 - 1/E)^T)."""
    return experts * (1 - (1 - 1 / experts) ** tokens)


class Sent(NamedTuple):
    """Bytes that one device sends for a collective: over the fast links of its host, and to other hosts."""

    inside: float
    across: float


def all_reduce(ways: Ways, size: float) -> Sent:
    """To sum an array of `size` bytes: a ring of reduce-scatter and all-gather, in each host and between them its shares."""
    return Sent(2 * _leaves(ways.inside, size), 2 * _leaves(ways.across, size / ways.inside))


def all_gather(ways: Ways, size: float) -> Sent:
    """Until all have an array of `size` bytes, which hosts exchange in shares."""
    return Sent(_leaves(ways.inside, size), _leaves(ways.across, size / ways.inside))


def all_to_all(ways: Ways, size: float) -> Sent:
    """To send each of the devices its part of `size` bytes."""
    return Sent(_leaves(ways.inside, size) / ways.across, _leaves(ways.across, size))


def _leaves(ways: int, size: float) -> float:
    """What does not stay at home of something divided among so many."""
    return (ways - 1) / ways * size


def decode(case: Case) -> Cost:
    """One token for every row, the last that the context has room for."""
    return step(case, case.batch, 1, case.context - 1)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Reading prompts of the whole context, one for each share of the batch at a time.

    Attributes:
      rows: prompts that are read together.
      piece: tokens of each that a step takes.
      seconds: until those rows have their first token.
      batch_seconds: until every row of the batch has.
      tokens_per_second: prompt tokens, all devices together.
      binds: what most of the time is spent on.
    """

    rows: int
    piece: int
    seconds: float
    batch_seconds: float
    tokens_per_second: float
    binds: str


def prefill(case: Case) -> Prefill:
    rows, piece = prefill_rows(case), prefill_piece(case)
    rest = case.context % piece
    costs = steps(case, rows, piece, range(0, case.context - rest, piece))
    spent: dict[str, float] = collections.defaultdict(float)
    for cost in itertools.chain(costs, steps(case, rows, rest, [case.context - rest]) if rest else ()):
        spent[cost.binds] += cost.step
    seconds = sum(spent.values())
    return Prefill(
        rows=rows,
        piece=piece,
        seconds=seconds,
        batch_seconds=math.ceil(case.batch / rows) * seconds,
        tokens_per_second=rows * case.context / seconds,
        binds=max(spent, key=spent.__getitem__),
    )


def step(case: Case, rows: int, tokens: int, start: int) -> Cost:
    """`rows` rows advance by `tokens` tokens each, `start` tokens after their beginnings."""
    return next(steps(case, rows, tokens, [start]))


def steps(case: Case, rows: int, tokens: int, starts: Iterable[int]) -> Iterator[Cost]:
    """One step for each of `starts`: a long prompt has hundreds of thousands, which differ by what their queries see."""
    text, size = case.config.text, itemsize(case.dtype)
    D = text.hidden_size
    (own_rows,) = case.local(("batch",), (rows,))
    (asking_rows,) = case.local((KEYS[0],), (rows,))
    experts, hit, routed_tokens, distinct = _experts(case, rows * tokens)

    # Of a decode step each device looks at its part of every row's pages.
    sharing = case.among(case.split_pages if tokens == 1 else ())
    parts, looking_rows = sharing.total, rows if tokens == 1 else asking_rows
    (kv_heads,) = case.local(("kv_heads",), (text.num_key_value_heads,))
    (heads,) = case.local(("heads",), (text.num_attention_heads,))
    weights = {part: float(size) for part, size in case.weight_bytes.items() if part not in (VISION, EMBEDDING)}
    elements = dict(case.matrix_elements)
    if text.tie_word_embeddings:  # the rows that are looked up, and then the whole table for the logits
        weights[UNEMBEDDING], elements[UNEMBEDDING] = float(case.weight_bytes[EMBEDDING]), elements[EMBEDDING]
    if text.moe_layers:
        weights[ROUTED] *= hit / experts
    weights[EMBEDDING] = own_rows * tokens * D * size

    used = {ATTENTION: asking_rows * tokens, UNEMBEDDING: own_rows}  # of a prompt only the last token has logits
    used |= dict.fromkeys((DENSE, SHARED, SMALL), own_rows * tokens)
    products = {part: 2.0 * elements[part] * count for part, count in used.items() if part in elements}
    if text.moe_layers:
        products[ROUTED] = 2.0 * elements[ROUTED] / experts * routed_tokens

    exchanges = _exchanges(case, rows, tokens)
    if parts > 1:  # float32 sums of the parts of a row's cache
        sums = looking_rows * heads * text.head_dim * 4
        exchanges["attention parts all-reduce"] = (text.num_hidden_layers, all_reduce(sharing, sums))
    sent = {name: count * each.inside for name, (count, each) in exchanges.items() if each.inside}
    crossed = {name: count * each.across for name, (count, each) in exchanges.items() if each.across}
    collectives = sum(count for count, _ in exchanges.values())
    chip = case.topology.chip
    mixtures, travels = len(text.moe_layers), any("all-to-all" in name for name in exchanges)
    of_layers = DENSE_LAYER * (text.num_hidden_layers - mixtures) + (TRAVELLING if travels else MIXTURE) * mixtures
    launches = BESIDE_LAYERS + of_layers if chip.is_gpu and tokens == 1 else 0
    in_experts = products.get(ROUTED, 0.0)
    compute = (sum(products.values()) - in_experts) / chip.flops + in_experts / (chip.fp8_flops if case.dtype == "fp8" else chip.flops)
    exchange = {"links": sum(sent.values()) / chip.link}
    if case.topology.hosts > 1:
        exchange["network"] = sum(crossed.values()) / chip.network

    for slots, pairs in _attention(case, tokens, starts):
        cache = 2 * looking_rows * kv_heads * slots * text.head_dim * size / parts
        scores = 4.0 * looking_rows * heads * text.head_dim * pairs / parts
        read, made = weights | {"cache": cache}, products | {"scores": scores}
        seconds = {"memory": sum(read.values()) / chip.bandwidth, "compute": compute + scores / chip.flops} | exchange
        yield Cost(read, made, sent, crossed, collectives, launches, seconds, distinct)


def _experts(case: Case, tokens: int) -> tuple[int, float, float, float]:
    """Of one device: experts it holds, distinct ones hit and tokens computed; and distinct ones hit by the whole batch.

    Expected values of uniform routing, and at least one expert and one token: somebody has it, and all wait.
    """
    E = case.config.text.num_local_experts
    if not case.config.text.moe_layers:
        return 1, 0.0, 0.0, 0.0
    (held,) = case.local(("expert",), (E,))
    apart = set(case.layout.mesh_axes("tokens")) - set(case.layout.mesh_axes("expert"))  # groups with experts of their own
    group = math.ceil(tokens / math.prod(case.mesh.shape[name] for name in apart))
    hit = held / E * distinct_experts(E, group)
    return held, max(1.0, hit), max(1.0, group * held / E), distinct_experts(E, tokens)


def _attention(case: Case, tokens: int, starts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Of one row, summed over the layers: cache slots read, and pairs of a query and a key that it sees, for each of `starts`.

    A decode step of a RoPE layer reads its whole buffer, whatever part of it belongs to the current chunk.
    """
    text = case.config.text
    layers = collections.Counter(text.chunk_of_layer(layer) for layer in range(text.num_hidden_layers))
    for start in starts:
        slots = pairs = 0
        for chunk, count in layers.items():
            before = start if chunk is None else min(start, chunk - 1) if tokens == 1 else start % chunk
            slots += count * (before + tokens)
            pairs += count * (tokens * before + tokens * (tokens + 1) // 2)
        yield slots, pairs


def _exchanges(case: Case, rows: int, tokens: int) -> dict[str, tuple[int, Sent]]:
    """Collectives of a step: how many of each kind, and what one device sends in one."""
    text = case.config.text
    layers, mixtures = text.num_hidden_layers, len(text.moe_layers)
    (own_rows,) = case.local(("batch",), (rows,))
    (asking_rows,) = case.local((KEYS[0],), (rows,))
    own, asking = own_rows * tokens * token_bytes(case), asking_rows * tokens * token_bytes(case)
    dispatched = math.ceil(rows * tokens / case.ways("tokens")) * token_bytes(case)

    def among(axis: str, size: int) -> Ways:
        return case.among(case.split(axis, size))

    to_experts = all_to_all(among("expert", text.num_local_experts), dispatched) if mixtures else Sent(0, 0)
    shared, routed = among("mlp", text.intermediate_size), among("expert_mlp", text.intermediate_size)
    apart = any(to_experts) or routed != shared  # where no token travels XLA adds both experts' parts first
    regrouped = case.among(case.split("batch", rows) ^ case.split(KEYS[0], rows))
    found = {
        "embedding all-reduce": (1, all_reduce(among("vocab", text.vocab_size), own)),
        "attention all-reduce": (layers, all_reduce(among("heads", text.num_attention_heads), asking)),
        "attention all-gather": (layers, all_gather(regrouped, max(own, asking))),
        "dense all-reduce": (layers - mixtures, all_reduce(among("mlp", text.intermediate_size_mlp), own)),
        "shared expert all-reduce": (mixtures, all_reduce(shared, own)),
        "all-to-all to experts": (mixtures, to_experts),
        "all-to-all from experts": (mixtures, to_experts),
        "routed expert all-reduce": (mixtures, all_reduce(routed, dispatched if apart else 0)),
    }
    return {name: (count, each) for name, (count, each) in found.items() if count and any(each)}


def token_bytes(case: Case) -> int:
    """Bytes of a token's hidden state: what goes to its expert, and what comes back."""
    return case.config.text.hidden_size * itemsize(case.dtype)
