"""No kernel for GPUs indexes beyond what Pallas-Triton counts: 32 bits of elements, unless an array has more than 2^32 bytes.

An int4 stack of a whole layer of Maverick and an fp8 stack divided by two lie between both, and ended in CUDA_ERROR_ILLEGAL_ADDRESS.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from maverick_jax.config import Config
from maverick_jax.ops import paged_attention_gpu
from maverick_jax.ops.grouped_matmul_gpu import DTYPES, grouped_matmul_gpu
from maverick_jax.ops.pages import Pages
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, quantized_shapes
from maverick_jax.ops.quantized_matmul_gpu import suits
from oracle.compiling import on_an_h200

TEXTS = {name: getattr(Config, name)().text for name in ("maverick", "scout")}
DIVISIONS = [2**n for n in range(8)]


def matrices(text, twice: bool) -> list[tuple[int, int, int]]:
    """Experts, inputs and outputs of gate and up, and of down."""
    E, D, F = ((1 + twice) * n for n in (text.num_local_experts, text.hidden_size, text.intermediate_size))
    return [(E, D, F), (E, F, D)]


def stack(name: str, shape: tuple[int, ...]):
    if name in DTYPES:
        return jax.ShapeDtypeStruct(shape, name)
    values, scales = quantized_shapes(shape, FORMATS[name], outputs=1, experts=True)
    return QuantizedArray(jax.ShapeDtypeStruct(values, FORMATS[name].values), jax.ShapeDtypeStruct(scales, FORMATS[name].scales))


def product_and_gradients(x, weight, sizes):
    if isinstance(weight, QuantizedArray):
        y, pull = jax.vjp(lambda x: grouped_matmul_gpu(x, weight, sizes), x)
    else:
        y, pull = jax.vjp(lambda x, weight: grouped_matmul_gpu(x, weight, sizes), x, weight)
    return pull(y)


def arguments(name: str, shape: tuple[int, int, int], rows: int):
    dtype = name if name in DTYPES else "bfloat16"
    return jax.ShapeDtypeStruct((rows, shape[1]), dtype), stack(name, shape), jax.ShapeDtypeStruct(shape[:1], jnp.int32)


def arrays_of_kernels(jaxpr: Jaxpr):
    """Shapes and dtypes of all that kernels read or write."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield from ((v.aval.size, v.aval.dtype.itemsize) for v in [*equation.invars, *equation.outvars])
        for inner in equation.params.values():
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from arrays_of_kernels(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def is_counted(size: int, itemsize: int) -> bool:
    """What jax does (`_compute_offsets_from_indices` of its lowering to Triton)."""
    return size <= 2**31 or size * itemsize > 2**32


@pytest.mark.parametrize("name", [*DTYPES, *FORMATS])
@pytest.mark.parametrize("twice", [False, True], ids=["as released", "twice its size"])
@pytest.mark.parametrize("model", TEXTS)
def test_every_stack_of_every_division(model, twice, name):
    """Experts divided, or the width, which divides outputs of gate and up and inputs of down."""
    found = set()
    for (E, K, N), narrower in zip(matrices(TEXTS[model], twice), ("outputs", "inputs"), strict=True):
        for by in DIVISIONS:
            shapes = {(E // by, K, N) if E % by == 0 else (E, K, N), (E, K, N // by) if narrower == "outputs" else (E, K // by, N)}
            for shape in shapes:
                assert suits(stack(name, shape))
                found |= set(arrays_of_kernels(jax.make_jaxpr(product_and_gradients)(*arguments(name, shape, 64)).jaxpr))
    assert max(size * itemsize for size, itemsize in found) > 2**28
    assert not [one for one in found if not is_counted(*one)]


@pytest.mark.parametrize("name, shape", [("int4", (128, 5120, 8192)), ("fp8", (64, 5120, 8192)), ("int8", (128, 5120, 4096))])
def test_what_an_h200_is_given(name, shape):
    """The two sizes that crashed, and the same bytes of int8, in the lowered text: four columns are one element."""
    with on_an_h200():
        traced = jax.jit(product_and_gradients).trace(*arguments(name, shape, 64))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__gpu\$xla\.gpu\.triton.* : \((.*)\) -> ", text)
    largest = []
    for call in calls:
        arrays = [(math.prod(map(int, shape.split("x")[:-1])), shape.split("x")[-1]) for shape in re.findall(r"tensor<([^>]*)>", call)]
        assert all(is_counted(size, int(re.sub(r"\D", "", dtype.partition("E")[0])) // 8) for size, dtype in arrays)
        largest.append(max(arrays)[1])
    assert largest.count("ui32") == 2  # the product and its gradient; the others plan the work, or make activations float16


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_pages_that_are_not_counted_are_left_to_others(dtype):
    query = jax.ShapeDtypeStruct((64, 1, 40, 128), jnp.bfloat16)
    for pages in (2**10, 2**12, 2**12 + 1, 2**13, 2**13 + 1):
        values = jax.ShapeDtypeStruct((pages, 8, 512, 128), dtype)
        counted = is_counted(values.size, values.dtype.itemsize)
        assert paged_attention_gpu.suits(query, Pages(values, values)) is counted
        assert counted or dtype == "int8"
