"""Products by quantized weights: on every platform those by the weights that they stand for, without a copy of the stack.

Shape suffixes: R rows, K inputs, N outputs, E experts.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from maverick_jax.errors import UserError
from maverick_jax.ops import grouped_matmul_gpu, grouped_matmul_tpu, quantized_matmul_gpu
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.linear import linear, linear_float32
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, dequantize, quantize, quantized_shapes
from maverick_jax.plan.hlo import count_traffic
from maverick_jax.plan.targets import OPTIONS, devices_of
from maverick_jax.plan.topology import Topology
from oracle.compiling import count_products

# Of the largest result. float32: sums in another order. bfloat16: results are rounded to 8 bits once, weights once or not at all.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}
SIZES = [3, 0, 5, 0, 33]
ROWS = sum(SIZES) + 4
FORMS = {
    "cpu": jax.jit(grouped_matmul),
    "gpu": lambda x, w, sizes: grouped_matmul_gpu.grouped_matmul_gpu(x, w, sizes, True),
    "tpu": lambda x, w, sizes: grouped_matmul_tpu.grouped_matmul_tpu(x, w, sizes, True),
}
needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def stack(name: str, E: int, K: int, N: int) -> QuantizedArray:
    random = np.random.default_rng(0)
    parts = [quantize(random.standard_normal((K, N), np.float32) / np.sqrt(np.float32(K)), FORMATS[name]) for _ in range(E)]
    return QuantizedArray(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*parts, strict=True)))


def abstract_stack(name: str, E: int, K: int, N: int, device=None) -> QuantizedArray:
    form = FORMATS[name]
    values, scales = quantized_shapes((E, K, N), form, outputs=1, experts=True)
    return QuantizedArray(abstract(values, form.values, device), abstract(scales, form.scales, device))


def abstract(shape, dtype, device=None) -> jax.ShapeDtypeStruct:
    sharding = device and NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def by_expert(rows, weight_EKN, transposed=False):
    """Row after row by the weights that are stood for, in float32; rows without an expert give zero."""
    matrices = np.asarray(weight_EKN).swapaxes(1, 2) if transposed else np.asarray(weight_EKN)
    expert_R = np.repeat(np.arange(len(SIZES)), SIZES)
    out = np.zeros((ROWS, matrices.shape[2]), np.float32)
    out[: len(expert_R)] = np.einsum("rk,rkn->rn", np.asarray(rows, np.float32)[: len(expert_R)], matrices[expert_R])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("platform", FORMS)
def test_rows_meet_the_weights_that_are_stood_for(platform, name, dtype):
    """Two groups of inputs, columns that fill no block, experts without rows, rows without an expert; and the gradient of x."""
    random, sizes = np.random.default_rng(1), jnp.asarray(SIZES, jnp.int32)
    weight = stack(name, len(SIZES), 256, 72)
    x, dy = (jnp.asarray(random.standard_normal((ROWS, width), np.float32), dtype) for width in (256, 72))
    y, pull = jax.vjp(lambda x: FORMS[platform](x, weight, sizes), x)
    whole = dequantize(weight, lead=1, dtype=jnp.float32)
    for ours, expected in ((y, by_expert(x, whole)), (pull(dy)[0], by_expert(dy, whole, transposed=True))):
        assert ours.dtype == jnp.dtype(dtype)
        assert_allclose(np.asarray(ours, np.float32), expected, atol=TOLERANCE[dtype] * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_a_gpu_makes_activations_of_any_size_float16(size, name):
    """By a power of two per row, of which nothing is to be seen; next to a row of zeros, and one that is no number."""
    random, sizes = np.random.default_rng(1), jnp.asarray([5], jnp.int32)
    weight, x = stack(name, 1, 128, 16), size * random.standard_normal((5, 128), np.float32)
    x[1], x[2, 3] = 0, np.nan
    x = jnp.asarray(x, jnp.bfloat16)
    y = np.asarray(FORMS["gpu"](x, weight, sizes), np.float32)
    expected = np.asarray(x, np.float32) @ np.asarray(dequantize(weight, lead=1, dtype=jnp.float32))[0]
    assert_allclose(y, expected, atol=TOLERANCE["bfloat16"] * np.nanmax(np.abs(expected)), rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cards_without_an_instruction_for_float8(monkeypatch, dtype):
    """As on an A100: its bits are a float16's with another exponent, those of the least values too."""
    monkeypatch.setattr(quantized_matmul_gpu, "converts_float8", lambda: False)
    quantized_matmul_gpu.quantized_matmul_gpu.clear_cache()
    test_rows_meet_the_weights_that_are_stood_for("gpu", "fp8", dtype)
    quantized_matmul_gpu.quantized_matmul_gpu.clear_cache()
    every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 1, 64, 4)
    words, form = jax.lax.bitcast_convert_type(every, jnp.uint32), quantized_matmul_gpu._Form(jnp.float8_e4m3fn, False, False, False)
    found = np.stack([np.asarray(matrix, np.float32) * form.unit for matrix in form.matrices(words[0])[0]], axis=-1)
    values = np.asarray(jax.lax.bitcast_convert_type(every[0], jnp.float8_e4m3fn).astype(jnp.float32))
    assert_array_equal(found[np.isfinite(values)], values[np.isfinite(values)])


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_tpu_takes_a_large_matrix_in_parts(monkeypatch, name):
    """Columns, inputs and, transposed, rows one part after the other: the last of each is smaller."""
    for limit, value in dict(MATRIX_BYTES=2**17, AT_ONCE=128, MOST_ROWS=16, SUBLANES=1).items():
        monkeypatch.setattr(grouped_matmul_tpu, limit, value)
    grouped_matmul_tpu._product.clear_cache()
    random, sizes = np.random.default_rng(1), jnp.asarray(SIZES, jnp.int32)
    weight = stack(name, len(SIZES), 640, 300)
    x, dy = (jnp.asarray(random.standard_normal((ROWS, width), np.float32)) for width in (640, 300))
    y, pull = jax.vjp(lambda x: FORMS["tpu"](x, weight, sizes), x)
    whole = dequantize(weight, lead=1, dtype=jnp.float32)
    for ours, expected in ((y, by_expert(x, whole)), (pull(dy)[0], by_expert(dy, whole, transposed=True))):
        assert_allclose(ours, expected, atol=TOLERANCE["float32"] * np.abs(expected).max(), rtol=0)
    grouped_matmul_tpu._product.clear_cache()


@pytest.mark.parametrize("kernels", [quantized_matmul_gpu, grouped_matmul_tpu])
def test_kernels_refuse_odd_groups(kernels):
    """Groups of 96 inputs, as in a tiny model: the stack is dequantized instead."""
    assert kernels.suits(abstract_stack("int4", 8, 5120, 64))
    assert kernels.suits(abstract_stack("fp8", 8, 96, 64))
    assert not kernels.suits(abstract_stack("int4", 8, 192, 64))


@pytest.mark.parametrize("name", FORMATS)
def test_a_cpu_holds_one_matrix_at_a_time(name):
    """Not the stack in another dtype. Only of floats XLA:CPU makes a copy, of their bits as integers."""
    E, K, N = 64, 128, 256
    arguments = abstract((4, K), jnp.float32), abstract_stack(name, E, K, N), abstract((E,), jnp.int32)
    memory = jax.jit(grouped_matmul).lower(*arguments).compile().memory_analysis()
    stored = E * K * N if name == "fp8" else 0
    assert memory.temp_size_in_bytes < stored + 3 * K * N * 4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 5])
def test_dense_products(rows, name, dtype):
    """Outputs of two axes, as of a query, and inputs of two, as of attention's output."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 256), np.float32), dtype)
    flat = jax.tree.map(lambda a: a[0], stack(name, 1, 256, 12))
    whole = np.asarray(dequantize(flat, dtype=jnp.float32))
    expected = np.asarray(x, np.float32) @ whole
    query = jax.tree.map(lambda a: a.reshape(*a.shape[:-1], 3, 4), flat)
    output = QuantizedArray(flat.values.reshape(8, -1, 12), flat.scales)
    close = functools.partial(assert_allclose, atol=TOLERANCE[dtype] * np.abs(expected).max(), rtol=0)
    close(np.asarray(jax.jit(linear)(x, query), np.float32).reshape(rows, 12), expected)
    by_two = jax.jit(functools.partial(linear_float32, contract=2))(x.reshape(rows, 8, 32), output)
    assert by_two.dtype == jnp.float32
    close(by_two, expected)
    dx = jax.grad(lambda x: linear_float32(x, flat).sum())(x)
    assert_allclose(np.asarray(dx, np.float32), np.broadcast_to(whole.sum(axis=1), dx.shape), atol=2 * TOLERANCE[dtype] * 4, rtol=0)


def decode_with_gradient(name, device, E=16):
    """Maverick's decode on one device of eight that divide the experts: program and arguments, and the bytes of the stack."""
    rows, K, N = 64, 5120, 8192

    def function(x, weight, sizes, dy):
        y, pull = jax.vjp(lambda x: grouped_matmul(x, weight, sizes), x)
        return y, pull(dy)

    x, dy = (abstract((rows, width), jnp.bfloat16, device) for width in (K, N))
    weight = abstract_stack(name, E, K, N, device)
    lowered = jax.jit(function).lower(x, weight, abstract((E,), jnp.int32, device), dy)
    return lowered, sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weight))


@needs_tpu_compiler
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_v6e_reads_what_is_stored_and_copies_nothing(name):
    """`ragged_dot` would first make 1.3 GB of bfloat16 out of it. The product and the gradient of x read it once each."""
    lowered, stored = decode_with_gradient(name, devices_of(Topology.parse("v6e:2x2"))[0])
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.02 * stored
    assert count_traffic(compiled.as_text()).hbm < 2.04 * stored


@needs_tpu_compiler
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_v6e_fuses_a_dense_product(name):
    """The dequantized matrix would be 84 MB; of four bits both halves read the bytes."""
    device = devices_of(Topology.parse("v6e:2x2"))[0]
    weight = jax.tree.map(lambda a: abstract(a.shape[1:], a.dtype, device), abstract_stack(name, 1, 5120, 8192))
    compiled = jax.jit(linear).lower(abstract((8, 5120), jnp.bfloat16, device), weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6
    assert count_traffic(compiled.as_text()).hbm < 1.05 * 5120 * 8192


@pytest.mark.parametrize("name, experts", [("fp8", 16), ("int4", 16), ("fp8", 64), ("int4", 128)])
def test_an_h200_reads_what_is_stored(name, experts):
    """One kernel each for the product and the gradient of x, no other product, no copy, although four columns are read as one word."""
    try:
        device = devices_of(Topology.parse("h200:8"))[0]
    except UserError as error:
        pytest.skip(str(error))
    compiled = decode_with_gradient(name, device, experts)[0].compile(compiler_options=OPTIONS["cuda"])
    assert count_products(compiled.as_text()) == 2
    assert " dot(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e6  # activations in another order
