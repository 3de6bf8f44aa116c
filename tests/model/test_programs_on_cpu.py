"""A program reads the weights where they lie: on a CPU in bfloat16, on accelerators the router's."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from maverick_jax.model import get_abstract_model, parameter_name
from oracle.plain import plain_config
from oracle.programs import arrays_made

# No other array has the shape of a weight, but for one expert's matrices, which are those of the shared one.
CONFIG = plain_config(num_hidden_layers=2, moe_layers=(1,), nope_layers=(), num_local_experts=16, intermediate_size_mlp=40)


def one_step(model, ids):
    return model(ids)


def loop(model, ids):
    """Of steps, as in a rollout: what does not change may be moved before it."""
    return lax.fori_loop(0, 4, lambda _, ids: model(ids).argmax(axis=-1).astype(jnp.int32), ids)


@pytest.mark.parametrize(("run", "read"), [(one_step, "text"), (loop, "experts")], ids=["one step", "loop"])
def test_no_weight_is_copied(run, read):
    """Each copy costs more than all that a step computes."""
    graphdef, weights = nnx.split(get_abstract_model(CONFIG, dtype="bfloat16"))
    program = jax.jit(lambda weights, ids: run(nnx.merge(graphdef, weights), ids))
    made = {array.shape for array in arrays_made(program.lower(weights, jax.ShapeDtypeStruct((1, 3), jnp.int32)).compile())}
    shapes = {parameter_name(path): leaf.shape for path, leaf in nnx.to_flat_state(weights) if read in path and len(leaf.shape) > 1}
    assert "text.layers.1.feed_forward.experts.gate" in shapes
    assert [name for name, shape in shapes.items() if shape in made and "shared" not in name] == []


def test_the_router_has_a_product_of_its_own():
    """XLA:GPU makes one of products that share an input, unless a barrier stands before one of them, here on every accelerator."""
    graphdef, weights = nnx.split(get_abstract_model(CONFIG, dtype="bfloat16"))
    program = jax.jit(lambda weights, ids: nnx.merge(graphdef, weights)(ids))
    text = program.trace(weights, jax.ShapeDtypeStruct((1, 3), jnp.int32)).lower(lowering_platforms=("tpu",)).as_text()  # without kernels
    kept_apart = re.findall(r"(%\S+) = stablehlo.optimization_barrier", text)
    router = f"tensor<{CONFIG.text.hidden_size}x{CONFIG.text.num_local_experts}xbf16>"
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line and router in line]
    assert len(products) == len(CONFIG.text.moe_layers)
    assert all(re.search(r"dot_general (%\S+),", line)[1] in kept_apart for line in products)
