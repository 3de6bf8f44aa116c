"""How fast a step of training can be at most: products, bytes of memory and exchanges of one device, each at the chip's full rate.

Shape letters as in `memory`. As everywhere in a plan nothing here is a forecast; what is counted is the least that a step of ours does.
"""

from __future__ import annotations

import collections
import math

from maverick_jax.plan.case import Case
from maverick_jax.plan.roofline import Cost, Sent, all_gather, all_reduce, all_to_all
from maverick_jax.plan.training.memory import gathered, memory, sent_rows
from maverick_jax.plan.training.recipe import FLOAT32, Training
from maverick_jax.plan.weights import ATTENTION, DENSE, EMBEDDING, ROUTED, SHARED, SMALL, UNEMBEDDING, VISION, Kind, itemsize, parameters
from maverick_jax.training.flops import flops_per_token

TEXT = (ROUTED, SHARED, DENSE, ATTENTION, SMALL)  # what all layers are made of
SCORES = "scores"  # attention's products, in which no weight is
MADE_AGAIN = {"layers": (*TEXT, SCORES), "products": (ROUTED, SCORES), "none": ()}  # by --remat
Exchanges = dict[str, list[tuple[int, Sent]]]


def step(training: Training) -> Cost:
    """One step: all micro-batches, and what the optimizer makes of their gradients."""
    case, chip = training.case, training.case.topology.chip
    read, products, exchanges = _read(training), _products(training), _exchanges(training)
    sent = {name: sum(count * each.inside for count, each in some) for name, some in exchanges.items()}
    crossed = {name: sum(count * each.across for count, each in some) for name, some in exchanges.items()}
    sent, crossed = ({name: size for name, size in sizes.items() if size} for sizes in (sent, crossed))
    seconds = {
        "memory": sum(read.values()) / chip.bandwidth,
        "compute": sum(products.values()) / chip.flops,  # quantized weights are multiplied out, and multiplied in bfloat16
        "links": sum(sent.values()) / chip.link,
    }
    if case.topology.hosts > 1:
        seconds["network"] = sum(crossed.values()) / chip.network
    collectives = sum(count for some in exchanges.values() for count, each in some if any(each))
    return Cost(read, products, sent, crossed, collectives, 0, seconds, 0.0)


def mfu(training: Training, cost: Cost) -> float:
    """Share of the devices' peak that goes into what must be computed: what is made again is no part of it."""
    case = training.case
    counted = training.tokens * flops_per_token(case.config, case.context, adapters_only=training.recipe.adapts)
    return counted / (cost.step * case.topology.chip.flops * case.topology.devices)


def _passes(training: Training, part: str) -> int:
    """How often a component's weights are multiplied by: forward, back to what came in, and once more where that is made again."""
    return 2 + (part in MADE_AGAIN[training.recipe.remat])


def _products(training: Training) -> dict[str, float]:
    """By component. Logits are made again in any case; of what is learned in full there is one product more, the weights' gradient."""
    case, text = training.case, training.case.config.text
    elements: collections.Counter[str] = collections.Counter()
    for (part, _, shape), count in parameters(case.config).items():
        if len(shape) > 1:
            elements[part] += math.prod(shape) * count
    if text.tie_word_embeddings:
        elements[UNEMBEDDING] = elements[EMBEDDING]
    if text.moe_layers:
        elements[ROUTED] //= text.num_local_experts
    learned = not training.recipe.adapts
    tokens = training.tokens / case.topology.devices
    found = {part: 2.0 * elements[part] * (_passes(training, part) + learned) * tokens for part in TEXT if elements[part]}
    found[UNEMBEDDING] = 2.0 * elements[UNEMBEDDING] * (3 + learned) * tokens
    # What is counted beyond the matrices' products, three times the forward pass, is that of queries and keys.
    of_matrices = 2.0 * (sum(elements[part] for part in (*TEXT, UNEMBEDDING))) * (2 + learned)
    scores = flops_per_token(case.config, case.context, adapters_only=training.recipe.adapts) - of_matrices
    return found | {SCORES: scores * (_passes(training, SCORES) + 1) / 3 * tokens}


def _read(training: Training) -> dict[str, float]:
    """Bytes to and from memory, by what moves: weights in every pass, what products take and give, logits, and the optimizer's own."""
    case, text, whole = training.case, training.case.config.text, gathered(training.case)
    e, D, N, micro = itemsize(case.dtype), text.hidden_size, training.local_tokens, training.recipe.accumulate
    mixtures, passes = len(text.moe_layers), {part: _passes(training, part) for part in TEXT}
    weights = whole.bytes_of(training.frozen + training.learned)
    found = {part: float(micro * passes[part] * size) for part, size in weights.items() if part in TEXT}
    found[UNEMBEDDING] = float(micro * 3 * weights.get(UNEMBEDDING, weights[EMBEDDING]))

    def share(axis: str, size: int) -> int:
        return case.local((axis,), (size,))[0]

    heads, kv_heads = share("heads", text.num_attention_heads), share("kv_heads", text.num_key_value_heads)
    widths = {
        ATTENTION: text.num_hidden_layers * (2 * D + 2 * (heads + kv_heads) * text.head_dim),
        DENSE: (text.num_hidden_layers - mixtures) * (2 * D + 3 * share("mlp", text.intermediate_size_mlp)),
        SHARED: mixtures * (2 * D + 3 * share("mlp", text.intermediate_size)),
        ROUTED: mixtures * (2 * D + 3 * share("expert_mlp", text.intermediate_size)),
    }
    tensor = case.topology.devices // case.row_ways
    found["activations"] = float(micro * N * sum(passes[part] * width for part, width in widths.items()) * e)
    found["logits"] = micro * 4.0 * N / tensor * text.vocab_size * FLOAT32  # written and read, and so when they are made again
    held = memory(training)
    kept = sum(case.bytes_of(training.learned).values())
    found["optimizer"] = float(2 * (kept + held.moments) + 2 * FLOAT32 * training.learned_elements)
    return found


def _exchanges(training: Training) -> Exchanges:
    """Collectives of a step: how many of each kind, and what one device sends in one."""
    case, text, micro = training.case, training.case.config.text, training.recipe.accumulate
    D, N, e = text.hidden_size, training.local_tokens, itemsize(training.case.dtype)
    layers, mixtures = text.num_hidden_layers, len(text.moe_layers)
    found: Exchanges = collections.defaultdict(list)
    for kind in training.frozen + training.learned:
        if kind.component in (VISION, EMBEDDING):
            continue
        gathers = 1 if kind.component == UNEMBEDDING or training.recipe.remat == "none" else 2
        found["weights all-gather"].append((micro * gathers * kind.number, _gather(training, kind)))
    for kind in training.learned:
        if kind.component not in (VISION, EMBEDDING):
            scatter, reduce = _sum(training, kind)
            found["gradients reduce-scatter"].append((micro * kind.number, scatter))
            found["gradients all-reduce"].append((micro * kind.number, reduce))
    to_experts = all_to_all(case.among(case.split("expert", text.num_local_experts)), sent_rows(case, N) * D * e)
    passes = _passes(training, ROUTED)
    found["tokens all-to-all"].append((micro * mixtures * (2 * passes - (passes == 3)), to_experts))  # made again, only the way there
    for name, part, axis, size, count in (
        ("attention all-reduce", ATTENTION, "heads", text.num_attention_heads, layers),
        ("dense all-reduce", DENSE, "mlp", text.intermediate_size_mlp, layers - mixtures),
        ("shared expert all-reduce", SHARED, "mlp", text.intermediate_size, mixtures),
        ("routed expert all-reduce", ROUTED, "expert_mlp", text.intermediate_size, mixtures),
    ):
        found[name].append((micro * _passes(training, part) * count, all_reduce(case.among(case.split(axis, size)), N * D * e)))
    return found


def _placed(training: Training, kind: Kind) -> tuple[set[str], set[str], int, int]:
    """Mesh axes that divide such leaves where they lie and where they are used, and the elements that a device has of one."""

    def place(case: Case) -> tuple[set[str], int]:
        return set().union(*case.layout.split(kind.axes, kind.shape, case.mesh)), math.prod(case.local(kind.axes, kind.shape))

    (lies, kept), (used, elements) = place(training.case), place(gathered(training.case))
    return lies, used, kept, elements


def _gather(training: Training, kind: Kind) -> Sent:
    """To have a leaf whole, in the dtype that a step computes with."""
    lies, used, _, elements = _placed(training, kind)
    size = kind.itemsize if training.recipe.adapts else itemsize(training.case.dtype)
    return all_gather(training.case.among(lies - used), elements * size)


def _sum(training: Training, kind: Kind) -> tuple[Sent, Sent]:
    """To sum a leaf's gradient over the devices that had tokens of their own: divided among those that keep a part, whole among others."""
    case = training.case
    lies, used, kept, elements = _placed(training, kind)
    size = kind.itemsize if training.recipe.adapts else itemsize(case.dtype)
    rows = case.split("batch", case.batch)
    return all_gather(case.among(lies - used), elements * size), all_reduce(case.among(rows - lies), kept * size)
