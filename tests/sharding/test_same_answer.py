"""The mini model says the same on every mesh, in every layout, by every dispatcher."""

import jax
import pytest

import maverick_jax as mj
from maverick_jax.inference.chat import Chat
from maverick_jax.sharding import make_mesh

QUESTIONS = ["What is 7 + 5?", "Is 8 more than 3?", "Name the digit after 4."]  # three rows: no mesh divides them
NEW = 8


def answers(**options) -> list[list[int]]:
    """Greedy tokens, in float32 so that no rounding decides between two of them."""
    model = mj.load(dtype="float32", **options)
    prompts = [Chat(model).raw_prompt(question).token_ids for question in QUESTIONS]
    return mj.generate(model, prompts, max_new_tokens=NEW, stop_ids=())


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """One device."""
    return answers()


@pytest.mark.parametrize(
    "sizes, layout, dispatcher",
    [
        (dict(expert=8), "throughput", None),
        (dict(data=2, expert=2, tensor=2), "throughput", None),
        (dict(data=2, expert=4), "throughput", "ragged"),
        (dict(expert=4, tensor=2), "throughput", "local"),
        (dict(expert=4, tensor=2), "latency", None),
        (dict(data=4, expert=2), "training", None),
    ],
)
def test_same_answer(alone, sizes, layout, dispatcher):
    """Where things lie must not decide what is said."""
    assert len(jax.devices()) >= 8
    assert answers(mesh=make_mesh(**sizes), layout=layout, dispatcher=dispatcher) == alone
