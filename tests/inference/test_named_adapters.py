"""Adapters in the engine: each request has the one that it names, whoever is computed beside it, and nobody else's cache."""

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from maverick_jax.adapter import load_adapter, save_adapter
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.pictures import keys
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.model.low_rank import add_adapters
from oracle.adapted import NAMED, save_named, teach
from oracle.compiling import no_compilation
from oracle.forward import TOLERANCE
from oracle.plain import PATCH, VISION, plain_model

NEW, LENGTH = 6, 64
TEXT = dict(num_hidden_layers=2, num_key_value_heads=2)
NAMES = (None, *NAMED)


@pytest.fixture(scope="module")
def base():
    """A chunk of 8; a dense layer, and one with experts that sees everything."""
    return plain_model(**TEXT)


@pytest.fixture(scope="module")
def paths(base, tmp_path_factory):
    return save_named(base, tmp_path_factory.mktemp("adapters"))


def request_of(ids, adapter: str | None) -> Request:
    return Request(ids=ids, max_new_tokens=NEW, stop_ids=(), adapter=adapter, sampling=Sampling(logprobs=0))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """The same prompts to everyone, some of which begin alike."""
    random = np.random.default_rng(0)
    shared = random.integers(4, 40, 21).tolist()
    return [request_of(ids, name) for ids in (shared, shared[:14], random.integers(4, 40, 3).tolist()) for name in NAMES]


@pytest.fixture(scope="module")
def alone(base, paths) -> dict[str | None, nnx.Module]:
    """By name, a model that was loaded with it."""
    models = {name: nnx.clone(base) for name in NAMES}
    for name in NAMED:
        load_adapter(models[name], paths[name])
    return models


def assert_told_by(models, handles) -> None:
    """Every token is the likeliest of its own model, as likely as that says."""
    for name, model in models.items():
        own = [handle for handle in handles if handle.request.adapter == name]
        texts = [[*handle.request.ids, *handle.tokens] for handle in own]
        ids = np.array([text + [0] * (32 - len(text)) for text in texts], np.int32)
        logits = jax.jit(lambda ids, model=model: model(ids))(ids)  # a drawn token may be a picture's, whose picture nobody asks for then
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        for row, handle in enumerate(own):
            expected = logprobs[row, len(handle.request.ids) - 1 : len(texts[row]) - 1]
            assert handle.tokens == expected.argmax(axis=-1).tolist()
            assert_allclose([one for one, _ in handle.logprobs], expected.max(axis=-1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("draft", [0, 3])
def test_each_has_its_own(base, paths, requests, alone, draft):
    """In mixed batches, prompts shared or not, with drafts, and when rows lose their places and are computed again."""
    engine = Engine(base, slots=5, max_length=LENGTH, pages=6, draft=draft, adapters=paths)
    assert engine.adapters == tuple(paths)
    for some in (requests, requests[::-1]):
        handles = engine.run(some)
        assert_told_by(alone, handles)
    assert engine.occupancy.preempted > 0
    assert len({handle.logprobs[0][0] for handle in handles}) == len(requests)  # they differ
    with no_compilation():
        engine.run(requests)


def test_no_prefix_is_shared_between_adapters(base, paths):
    """Keys and values are the adapter's work: the same words under another one are another prefix, at once and later."""
    engine = Engine(base, slots=5, max_length=LENGTH, adapters=paths)
    asked = [request_of([*range(5, 26)], name) for name in NAMES]
    assert [handle.cached_tokens for handle in engine.run(asked)] == [0] * len(NAMES)
    (again,) = engine.run(asked[1:2])
    assert again.cached_tokens == 16
    twice = engine.run([request_of([7, *range(5, 25)], name) for name in ("law", "law", "poems")])
    assert [handle.cached_tokens > 0 for handle in twice] == [False, True, False]


def test_keys_of_a_beginning():
    """A picture's too is another one under another adapter."""
    for begins, tiles in ((5, []), (PATCH, [bytes(8)])):
        by_adapter = [keys(np.array([begins, 6, 7]), PATCH, tiles, 1, adapter) for adapter in range(4)]
        assert len({found[0] for found in by_adapter}) == 4
        assert {tuple(found[1:]) for found in by_adapter} == {(6, 7)}
        assert all(-(2**63) <= found[0] < 2**63 for found in by_adapter)


def test_mistakes(base, paths, tmp_path):
    """One line each, that names the thing."""
    options = {"slots": 1, "max_length": LENGTH}
    with pytest.raises(UserError, match=r"^adapter is 'poem': this engine has support, poems, law\.$"):
        Engine(base, adapters=paths, **options).submit(request_of([5], "poem"))
    with pytest.raises(UserError, match=r"^adapter is 'poems': this engine has none; make it with adapters="):
        Engine(base, **options).submit(request_of([5], "poems"))
    for wrong in (["support"], {"": paths["law"]}, {1: paths["law"]}):
        with pytest.raises(UserError, match=r"^adapters is .*: give directories by their names"):
            Engine(base, adapters=wrong, **options)
    adapted, other = nnx.clone(base), nnx.clone(base)
    load_adapter(adapted, paths["law"])
    other.text.norm.set_value(2 * other.text.norm[...])
    with pytest.raises(UserError, match="this model has an adapter, which all requests have: load the base alone"):
        Engine(adapted, adapters=paths, **options)
    with pytest.raises(UserError, match="nowhere"):
        Engine(base, adapters={"law": tmp_path / "nowhere"}, **options)
    with pytest.raises(UserError, match="was trained on another base"):
        Engine(other, adapters=paths, **options)


@pytest.mark.parametrize(
    ("part", "value", "said"), [("vision", 1.0, "pictures are computed once for all"), ("dense", np.nan, "NaN or inf")]
)
def test_adapters_that_would_reach_others(tmp_path, part, value, said):
    """A picture's features are kept for everyone, and zero times NaN is NaN."""
    model = plain_model(**TEXT, vision=VISION)
    add_adapters(model, {part: 1})
    teach(model)
    for up in [layer.feed_forward.up for layer in model.text.layers if part == "dense" and hasattr(layer.feed_forward, "up")]:
        up.b.set_value(value * up.b[...])
    path = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        Engine(plain_model(**TEXT, vision=VISION), slots=1, max_length=LENGTH, adapters={"wrong": path})
