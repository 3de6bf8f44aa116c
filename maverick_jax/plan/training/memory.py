"""What lies in a device's memory in a step of training: weights, what is learned and its moments exactly, the step's own by estimate.

Shape letters: N tokens of a device, T of a row, S rows of a device's all-to-all buffers, D model width, F widths, H heads, d head size,
V vocabulary, e bytes per element. The estimate is held against the compilers' own account in tests/plan/test_training_memory.py.
"""

from __future__ import annotations

import dataclasses
import math

from maverick_jax.ops.attention import MOST_SCORES
from maverick_jax.ops.quantize import FORMATS
from maverick_jax.plan.case import Case
from maverick_jax.plan.memory import DISPATCH_ROOM, Held
from maverick_jax.plan.training.recipe import FLOAT32, MOMENTS, Training
from maverick_jax.plan.weights import ATTENTION, DENSE, ROUTED, SHARED, Kind, itemsize
from maverick_jax.sharding.attend import KEYS
from maverick_jax.sharding.choice import ROUNDS
from maverick_jax.sharding.layout import Layout
from maverick_jax.training.logits import piece_length

GATHERED = ("embed", "table_embed", "expert_embed", "vision_embed")  # logical axes that are put together where a weight is used
AT_WORK = 3  # arrays in the activations' dtype that a SwiGLU's gradient holds at once, beside two in float32
STREAM = 10  # arrays of the model width that a layer's gradient holds at once
BUFFERS = 6  # of an all-to-all and back, and of their gradients


@dataclasses.dataclass(frozen=True)
class TrainingMemory(Held):
    """Of a model that learns. What all weights are learned from is counted among the weights, in the dtype that it is kept in.

    Attributes:
      adapters, moments: what is learned beside the weights, and the optimizer's of all that is learned.
    """

    adapters: int
    moments: int

    @property
    def state(self) -> dict[str, int]:
        return {name: size for name, size in (("adapters", self.adapters), ("optimizer moments", self.moments)) if size}


def memory(training: Training) -> TrainingMemory:
    """The memory of a step."""
    case, learned = training.case, training.learned
    adapters = sum(case.bytes_of(learned).values()) if training.recipe.adapts else 0
    weights = case.bytes_of(training.frozen if training.recipe.adapts else training.frozen + learned)
    moments = MOMENTS * FLOAT32 * training.learned_elements
    return TrainingMemory(weights, temporaries(training), case.topology.chip.memory, adapters, moments)


def temporaries(training: Training) -> dict[str, int]:
    """Bytes per device that a step needs beside what stays: an estimate.

    * Going back, gradients of more and more layers take the place of what fewer and fewer layers have kept: the larger of the two. Several
      micro-batches have their sum beside it.
    * Beside that there is either a layer at work, its weights gathered, or a piece of the logits beside the gathered unembedding.
    """
    gradients = FLOAT32 * training.learned_elements
    sums = gradients if training.recipe.accumulate > 1 else 0
    layer, logits = _layer(training), _logits(training)
    work = layer if sum(layer.values()) >= sum(logits.values()) else logits
    kept = {"kept by layers": _kept(training)} if _kept(training) >= gradients else {"gradients": gradients}
    return {**kept, "sums of gradients": sums, "attention blocks": _attention(training), **work}


def gathered(case: Case) -> Case:
    """The same where each weight is put together that is used."""
    rows = tuple((axis, to) for axis, to in case.layout.rows if axis not in GATHERED)
    return dataclasses.replace(case, layout=Layout(case.layout.name, rows))


def sent_rows(case: Case, tokens: int) -> int:
    """Rows of the buffer that `tokens` of a device leave it in, in one round; all of them if no token travels."""
    ways = case.among(case.split("expert", case.config.text.num_local_experts)).total
    return tokens if ways == 1 else ways * min(tokens, math.ceil(DISPATCH_ROOM * tokens / ways))


def _kept(training: Training) -> int:
    """What goes into each layer; with products what they give, attention's scores among it; or whatever a gradient asks for."""
    case, text, N = training.case, training.case.config.text, training.local_tokens
    e, D = itemsize(case.dtype), text.hidden_size
    found = text.num_hidden_layers * N * D * e
    if training.recipe.remat == "layers":
        return found
    layers, mixtures, S = text.num_hidden_layers, len(text.moe_layers), sent_rows(case, N)
    heads, dense, shared, routed = _heads(case), _width(case, DENSE), _width(case, SHARED), _width(case, ROUTED)
    swiglus = N * ((layers - mixtures) * dense + mixtures * shared)  # elements as wide as a feed-forward's inside
    of_experts = mixtures * S * (2 * routed + D)
    products = layers * N * (3 * heads * text.head_dim + D) + 2 * swiglus
    if training.recipe.remat == "products":
        return found + products * e
    between = layers * N * (3 * D + 2 * heads * text.head_dim) + swiglus + mixtures * S * 2 * (routed + D)
    return found + (products + of_experts + between) * e


def _layer(training: Training) -> dict[str, int]:
    """Of the layer whose gradient needs most."""
    case, text, N = training.case, training.case.config.text, training.local_tokens
    e, D = itemsize(case.dtype), text.hidden_size
    swiglu = 2 * FLOAT32 + AT_WORK * e
    found = []
    if len(text.moe_layers) < text.num_hidden_layers:
        weights = _of_one_layer(training, DENSE) + _of_one_layer(training, ATTENTION)
        found.append({"a layer's weights": weights, "a layer": N * (STREAM * D * e + _width(case, DENSE) * swiglu)})
    if text.moe_layers:
        S = sent_rows(case, N)
        room_for_all = N * case.among(case.split("expert", text.num_local_experts)).total
        rounds = ROUNDS if room_for_all > S else 1
        experts = S * (_width(case, ROUTED) * swiglu + BUFFERS * D * e)
        weights = _of_one_layer(training, ROUTED) + _of_one_layer(training, SHARED)
        here = N * (2 * D * FLOAT32 + _width(case, SHARED) * swiglu)
        found.append(
            {"a layer's weights": weights, "a layer": here, f"routed experts, {rounds} round{'s' * (rounds > 1)}": rounds * experts}
        )
    return max(found, key=lambda kinds: sum(kinds.values()))


def _of_one_layer(training: Training, part: str) -> int:
    """A layer's weights of one component as far as they are gathered; of experts that are not quantized the gradients of all rounds too."""
    case, whole = training.case, gathered(training.case)
    kinds = [kind for kind in training.frozen + training.learned if kind.component == part]
    layers, mixtures = case.config.text.num_hidden_layers, len(case.config.text.moe_layers)
    many = {DENSE: layers - mixtures, ATTENTION: layers}.get(part, mixtures)
    parts, together = (sum(some.bytes_of(_computed(kind, training) for kind in kinds).values()) for some in (case, whole))
    if parts == together:
        return 0
    copies = 1 + ROUNDS if part == ROUTED and case.dtype not in FORMATS else 1
    return copies * together // many


def _computed(kind: Kind, training: Training) -> Kind:
    """As a step computes with it: masters are copied to the model's dtype."""
    return kind if training.recipe.adapts else kind._replace(itemsize=itemsize(training.case.dtype))


def _logits(training: Training) -> dict[str, int]:
    """A piece of them in float32, its gradient in both dtypes, and the gathered unembedding."""
    case, text, N = training.case, training.case.config.text, training.local_tokens
    e, V = itemsize(case.dtype), text.vocab_size
    (rows,) = case.local(("batch",), (case.batch,))
    T = N // rows
    tensor = case.topology.devices // case.row_ways
    own = T // tensor if T % tensor == 0 else T
    piece = rows * piece_length(rows, own, V)
    return {"unembedding": text.hidden_size * V * e, "a piece of the logits": piece * V * (2 * FLOAT32 + e)}


def _attention(training: Training) -> int:
    """Scores of a block; and on GPUs what the loops over blocks fill, which XLA:GPU sets to zero for all layers before the first."""
    case, text, N = training.case, training.case.config.text, training.local_tokens
    e = itemsize(case.dtype)
    (rows,) = case.local((KEYS[0],), (case.batch,))
    scores = rows * _heads(case) * case.context**2
    if scores <= MOST_SCORES:
        return scores * (FLOAT32 + e)
    filled = 2 * FLOAT32 + e if training.recipe.accumulate > 1 else FLOAT32 + e
    held = text.num_hidden_layers * N * _heads(case) * text.head_dim * filled if case.topology.chip.is_gpu else 0
    return held + MOST_SCORES * (FLOAT32 + e)


def _heads(case: Case) -> int:
    return case.local(("heads",), (case.config.text.num_attention_heads,))[0]


def _width(case: Case, part: str) -> int:
    """A device's share of a feed-forward's width."""
    text = case.config.text
    axis, width = (
        ("mlp", text.intermediate_size_mlp) if part == DENSE else ("expert_mlp" if part == ROUTED else "mlp", text.intermediate_size)
    )
    return case.local((axis,), (width,))[0]
