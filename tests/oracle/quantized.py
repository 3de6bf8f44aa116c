"""A model with quantized weights, and its twin with the weights that they stand for."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import Llama4TextConfig

from maverick_jax.model import Llama4, get_abstract_model, parameter_name
from maverick_jax.model.quantized import quantizable, quantized_leaves, set_quantized
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, dequantize, quantize
from maverick_jax.sharding import THROUGHPUT, AttendOnMesh, Constrain, Layout, make_dispatcher
from oracle.port import port
from oracle.tiny_checkpoints import make_model, text_values

Arrays = dict[str, np.ndarray]


def small_model(layers: int) -> Llama4:
    """The text of the tiny Maverick with fewer layers; the second and every other one behind it is a mixture."""
    return port(make_model(Llama4TextConfig(**text_values("maverick", num_hidden_layers=layers, no_rope_layers=[1] * (layers - 1) + [0]))))


def quantize_arrays(model: Llama4, form: str, components: Collection[str]) -> tuple[Arrays, Arrays]:
    """All parameters of a model by name, these components quantized; and with what they stand for in their place."""
    shapes = quantized_leaves(model, form, components)
    stored = {parameter_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    meant = dict(stored)
    for name, leaf in quantizable(model, components):
        stack, inputs = leaf.get_metadata()["sides"]
        K = int(np.prod(leaf.shape[stack : stack + inputs]))
        matrices = stored.pop(name).reshape(*leaf.shape[:stack], K, -1)
        parts = [quantize(matrix, FORMATS[form]) for matrix in (matrices if stack else [matrices])]
        for part, arrays in zip(("values", "scales"), zip(*parts, strict=True), strict=True):
            stored[f"{name}.{part}"] = np.stack(arrays).reshape(shapes[f"{name}.{part}"][0])
        array = QuantizedArray(jnp.asarray(stored[f"{name}.values"]), jnp.asarray(stored[f"{name}.scales"]))
        meant[name] = np.asarray(dequantize(array, inputs=inputs, lead=stack, dtype=jnp.float32))
    return stored, meant


def model_of(like: Llama4, arrays: Arrays, *, mesh: Mesh | None = None, layout: Layout = THROUGHPUT) -> Llama4:
    """A float32 model of these arrays, on one device or laid out over a mesh, quantized where they are."""
    options = {}
    if mesh is not None:
        options = {
            "constrain": Constrain(mesh, layout),
            "dispatcher": make_dispatcher(mesh, layout),
            "attend": AttendOnMesh(mesh, layout),
        }
    model = get_abstract_model(like.config, dtype="float32", **options)
    set_quantized(model, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    graphdef, state = nnx.split(model)
    for path, leaf in nnx.to_flat_state(state):
        array = arrays[parameter_name(path)]
        assert (leaf.shape, np.dtype(leaf.dtype)) == (array.shape, array.dtype)
        placed = None if mesh is None else layout.sharding(leaf.get_metadata()["axes"], leaf.shape, mesh)
        leaf.set_value(jax.device_put(jnp.asarray(array), placed))
    return nnx.merge(graphdef, state)
