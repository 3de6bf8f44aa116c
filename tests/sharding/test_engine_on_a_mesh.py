"""The engine over eight devices: the tokens of one device, and no program compiled twice because an array lies otherwise."""

import numpy as np
import pytest

from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.sharding import LATENCY, THROUGHPUT, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from oracle.compiling import no_compilation
from oracle.plain import PATCH, SIDE, VISION, plain_model

SIZES = dict(vision=VISION, attention_chunk_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
NEW = 10


def requests_of(routed: int | None) -> list[Request]:
    """`routed`: of one that asks for its experts, from which token on."""
    random = np.random.default_rng(0)
    shared = random.integers(4, 40, 19).tolist()
    tiles = random.uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32)
    found = [Request(ids=random.integers(4, 40, n).tolist(), max_new_tokens=NEW, stop_ids=()) for n in (1, 9)]
    found += [Request(ids=random.integers(4, 40, 26).tolist(), max_new_tokens=NEW, stop_ids=(), routed_experts_prompt_start=routed)]
    found += [Request(ids=shared, max_new_tokens=NEW, stop_ids=(), sampling=Sampling(temperature=t, seed=3)) for t in (0, 1.0)]
    return [*found, Request(ids=[5, PATCH, 6, PATCH, *shared[:9]], tiles=tiles, max_new_tokens=NEW, stop_ids=())]


@pytest.mark.parametrize(
    "sizes, layout, routed",
    [(dict(expert=8), THROUGHPUT, 0), (dict(data=2, expert=2, tensor=2), LATENCY, None)],
    ids=["throughput", "latency"],
)
def test_tokens_of_one_device_and_programs_compiled_once(sizes, layout, routed):
    """Pages are divided by their slots, rows and experts by the layout; requests share prefixes, and one asks for its experts."""
    requests, rest = requests_of(routed), {"slots": 2, "max_length": 64, "routed_experts": routed is not None}
    expected = [said(Engine(plain_model(**SIZES), reuse=False, **rest).run([request])[0]) for request in requests]
    mesh = make_mesh(**sizes)
    options = dict(constrain=Constrain(mesh, layout), dispatcher=make_dispatcher(mesh, layout), attend=AttendOnMesh(mesh, layout))
    engine = Engine(plain_model(options=options, **SIZES), **rest)
    assert not engine._serving.runner.state.layers[1].key_NKPd.sharding.is_fully_replicated
    for _ in range(2):  # the second time prefixes are there to be copied
        assert [said(handle) for handle in engine.run(requests)] == expected
    with no_compilation():
        assert [said(handle) for handle in engine.run(requests)] == expected
    assert engine.dropped == 0


def said(handle) -> tuple[list[int], list[list[int]]]:
    return handle.tokens, handle.routed_experts.tolist()
