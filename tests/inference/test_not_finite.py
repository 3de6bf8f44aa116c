"""NaN or infinity ends a generation with the layer it comes from; the most likely token of a row of NaN would be 0 for ever."""

import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference import not_finite
from maverick_jax.inference.generate import engine_for, generate
from maverick_jax.inference.request import Finish, Request
from maverick_jax.model import Llama4
from maverick_jax.sharding import THROUGHPUT, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from oracle.plain import PATCH, SIDE, VISION, plain_model

PROMPTS = [[4, 5, 6], [7, 8, 9, 10, 11]]


def parameter(model: Llama4, name: str):
    value = model
    for part in name.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def damage(model: Llama4, name: str, value: float = float("nan"), at=None) -> Llama4:
    leaf = parameter(model, name)
    leaf.set_value(leaf[...].at[(0,) * leaf[...].ndim if at is None else at].set(value))
    return model


def refusal(model: Llama4, prompts=PROMPTS, **options) -> str:
    with pytest.raises(UserError) as caught:
        generate(model, prompts, max_new_tokens=12, stop_ids=(), **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("text.embedding", "text.embedding"),
        ("text.layers.0.attention.value", "text.layers.0"),
        ("text.layers.1.feed_forward.shared.up", "text.layers.1"),
        ("text.layers.2.feed_forward_norm", "text.layers.2"),
        ("text.norm", "text.norm"),
        ("text.unembedding", "text.unembedding"),
    ],
)
def test_the_first_layer_is_named(name, layer):
    """One damaged weight makes everything behind it NaN: only where it begins helps."""
    said = refusal(damage(plain_model(), name))
    assert said.startswith(f"prompt 0: the logits are not finite after 0 new tokens: {layer} is the first layer whose output is not; ")
    assert f"its weight {name} holds NaN or infinity: fetch or convert the checkpoint again" in said


@pytest.mark.parametrize(
    "name, layer",
    [
        ("vision.position_embedding", "vision.patch_embedding"),
        ("vision.layers.1.feed_forward.up", "vision.layers.1"),
        ("vision.adapter.down", "vision.adapter"),
        ("projector", "projector"),
    ],
)
def test_the_first_layer_of_the_vision_tower(name, layer):
    """Pictures come in before the text: a row that sees one is NaN from its picture on."""
    tiles = np.random.default_rng(0).uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32)
    said = refusal(damage(plain_model(vision=VISION), name), [[4, 5, 6], [7, PATCH, PATCH]], tiles=tiles)
    assert f"{layer} is the first layer whose output is not" in said


def test_float16_overflows():
    """Weights that are whole, and products that float16 cannot hold: another dtype helps, another download would not."""
    model = plain_model(dtype="float16")
    for name in ("value", "output"):
        weight = parameter(model, f"text.layers.1.attention.{name}")
        weight.set_value(weight[...] * 1e3)
    said = refusal(model)
    assert said.endswith("text.layers.1 is the first layer whose output is not; float16 holds no number beyond 65504: "
                         "load the model with dtype 'bfloat16'.")  # fmt: skip


def test_tokens_come_until_it_happens(monkeypatch):
    """NaN in one row of the embedding is met when that token comes: what came before is right, and the count says where it was."""
    expected = generate(plain_model(), [PROMPTS[1]], max_new_tokens=12, stop_ids=())[0]
    at = next(i for i, token in enumerate(expected) if i > 2 and token not in [0, *PROMPTS[1], *expected[:i]])  # 0 is what pads
    monkeypatch.setattr(not_finite, "PIECES", (4,))  # the row is read again in pieces
    engine = engine_for(damage(plain_model(), "text.embedding", at=expected[at]), [20])
    handle = engine.submit(Request(ids=PROMPTS[1], max_new_tokens=12, stop_ids=()))
    with pytest.raises(UserError, match=rf"the logits are not finite after {at + 1} new tokens: text\.embedding is the first layer"):
        list(handle)
    assert handle.tokens == expected[: at + 1]
    assert handle.finish is Finish.ERROR


def test_the_row_is_named_and_others_do_not_hide_it():
    """NaN where only the second prompt comes by."""
    said = refusal(damage(plain_model(), "text.embedding", at=PROMPTS[1][2]))
    assert said.startswith("prompt 1: the logits are not finite after 0 new tokens: text.embedding is")


def test_on_a_mesh():
    """Every device computes a part of the logits: one bad part makes the row."""
    mesh = make_mesh(tensor=2)
    options = dict(
        constrain=Constrain(mesh, THROUGHPUT), dispatcher=make_dispatcher(mesh, THROUGHPUT), attend=AttendOnMesh(mesh, THROUGHPUT)
    )
    model = damage(plain_model(num_key_value_heads=2, options=options), "text.layers.1.feed_forward.router")
    assert "text.layers.1 is the first layer whose output is not" in refusal(model)


def test_infinite_logits_of_a_sampled_row():
    """Infinity is no likelihood either: a draw from it takes any token."""
    said = refusal(damage(plain_model(), "text.unembedding", jnp.inf), temperature=1.0)
    assert "text.unembedding is the first layer whose output is not" in said
