"""Rows in float8 by matrices in float8, a scale for each row: the same products on every platform, and Hopper's own instruction.

Shape suffixes: R rows, K inputs, N outputs, E experts.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose
from test_grouped_matmul_hopper import CARD, simulated
from test_quantized_matmul import ROWS, SIZES, abstract_stack, stack

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.convert import convert
from maverick_jax.errors import UserError
from maverick_jax.model.quantized import inputs_together
from maverick_jax.ops import grouped_matmul_hopper, toolkit
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.quantize import QuantizedArray, dequantize
from maverick_jax.plan.targets import OPTIONS, devices_of
from maverick_jax.plan.topology import Topology
from oracle.compiling import on_an_h200

EXACT = {"float32": 2e-6, "bfloat16": 2**-7}  # of the largest: sums in another order; weights, sums and results rounded to 8 bits


def in_float8(x_RK: np.ndarray) -> np.ndarray:
    """What the rows are taken for: the nearest float8, 448 for the largest of each."""
    scale_R1 = np.abs(x_RK).max(axis=1, keepdims=True) / 448
    scale_R1[scale_R1 == 0] = 1
    return (x_RK / scale_R1).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_R1


def by_expert(x_RK: np.ndarray, weight: QuantizedArray, sizes: list[int]) -> np.ndarray:
    whole = np.asarray(dequantize(weight, lead=1, dtype=jnp.float32))
    y_RN, start = np.zeros((len(x_RK), whole.shape[2]), np.float32), 0
    for expert, size in enumerate(sizes):
        y_RN[start : start + size] = in_float8(x_RK[start : start + size]) @ whole[expert]
        start += size
    return y_RN


def float8_rows(weight: QuantizedArray) -> QuantizedArray:
    return dataclasses.replace(weight, float8_rows=True)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_products_are_of_float8s(name, dtype):
    """Large and small rows keep a scale of their own; a row of zeros has none, and rows without an expert give zero."""
    x_RK = 100 * np.random.default_rng(1).standard_normal((ROWS, 256), np.float32)
    x_RK[:, 0] = 448  # a power of two is every scale, so that what lies between two float8s does so after any division
    x_RK *= 2.0 ** (np.arange(ROWS, dtype=np.float32) - ROWS // 2)[:, None]
    x_RK[4] = 0
    x_RK = np.array(jnp.asarray(x_RK, dtype), np.float32)
    weight = stack(name, len(SIZES), 256, 72)
    y_RN = np.asarray(grouped_matmul(jnp.asarray(x_RK, dtype), float8_rows(weight), jnp.asarray(SIZES, jnp.int32)), np.float32)
    expected = by_expert(x_RK, weight, SIZES)
    largest_R1 = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 1e-30)
    assert_allclose(y_RN / largest_R1, expected / largest_R1, atol=EXACT[dtype], rtol=0)
    assert (np.asarray(grouped_matmul(jnp.asarray(x_RK, dtype), weight, jnp.asarray(SIZES, jnp.int32)), np.float32) != y_RN).any()


def test_a_row_that_is_no_number_stays_alone():
    """Beside it one of the least normal numbers, whose scale would be none."""
    x_RK = np.random.default_rng(1).standard_normal((5, 128), np.float32)
    x_RK[2, 3] = np.nan
    x_RK[4] = 2.0**-126
    y_RN = np.asarray(grouped_matmul(jnp.asarray(x_RK), float8_rows(stack("fp8", 1, 128, 16)), jnp.asarray([5], jnp.int32)))
    assert np.isnan(y_RN).any(axis=1).tolist() == [False, False, True, False, False]


@simulated
@pytest.mark.parametrize("sizes, rows", [([64, 0, 64], 128), ([7, 100, 33], 150)])
def test_hopper_multiplies_float8s(sizes, rows):
    """Its kernel on a card that jax simulates. Results are sums, in bfloat16."""
    x_RK = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 256), np.float32), jnp.float8_e4m3fn)
    weight = stack("fp8", len(sizes), 256, 128)
    y_RN = grouped_matmul_hopper.product(x_RK, weight.values.swapaxes(1, 2), jnp.asarray(sizes, jnp.int32), transposed=True, interpret=CARD)
    assert y_RN.dtype == jnp.bfloat16
    values, start = np.asarray(weight.values, np.float32), 0
    expected = np.zeros(y_RN.shape, np.float32)
    for expert, size in enumerate(sizes):
        expected[start : start + size] = np.asarray(x_RK[start : start + size], np.float32) @ values[expert]
        start += size
    assert_allclose(np.asarray(y_RN, np.float32), expected, atol=2**-8 * np.abs(expected).max(), rtol=0)


def lowered() -> str:
    arguments = (
        jax.ShapeDtypeStruct((64, 5120), jnp.bfloat16),
        abstract_stack("fp8", 16, 5120, 8192),
        jax.ShapeDtypeStruct((16,), jnp.int32),
    )
    with on_an_h200():
        traced = jax.jit(lambda x, w, sizes: grouped_matmul(x, float8_rows(w), sizes)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_older_cards_multiply_floats(monkeypatch):
    """Without the environment asking for Mosaic: only Hopper has these instructions from it."""
    assert "mosaic_gpu" in lowered()
    monkeypatch.setattr(toolkit, "on_hopper", lambda: False)
    monkeypatch.setattr("maverick_jax.ops.grouped_matmul.on_hopper", lambda: False)
    assert "mosaic_gpu" not in lowered()


def test_an_h200_reads_float8s_where_they_lie():
    """Laid with the inputs together, a stack is not copied."""
    try:
        device = devices_of(Topology.parse("h200:1"))[0]
    except UserError as error:
        pytest.skip(str(error))
    whole = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    weight = abstract_stack("fp8", 16, 5120, 8192, device)
    laid = jax.ShapeDtypeStruct(weight.values.shape, weight.values.dtype, sharding=Format(Layout((0, 2, 1)), whole))
    x, sizes = jax.ShapeDtypeStruct((512, 5120), jnp.bfloat16, sharding=whole), jax.ShapeDtypeStruct((16,), jnp.int32, sharding=whole)
    function = jax.jit(lambda x, values, scales, sizes: grouped_matmul(x, QuantizedArray(values, scales, True), sizes))
    compiled = function.lower(x, laid, weight.scales, sizes).compile(compiler_options=OPTIONS["cuda"])
    assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1
    assert not re.search(r"f8e4m3fn\[16,\d+,\d+\]\S* (copy|transpose|fusion)\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * x.size * 2 + 512 * 8192 * 4


@pytest.fixture(scope="module")
def mini8(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mini") / "fp8"
    convert(mini_directory(), directory, target="fp8", progress=False)
    return directory


def test_a_model_of_them(mini8):
    """Other logits than with rows as they are, by a fifth for random text; on eight devices the same."""
    ids = np.random.default_rng(0).integers(4, 200, (2, 24))
    plain, rounded = (np.asarray(mj.load(mini8, dtype="float32", activations=kind)(ids)) for kind in (None, "fp8"))
    off = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    assert 1e-3 < off < 0.3
    divided = mj.load(mini8, dtype="float32", activations="fp8", mesh=mj.make_mesh(data=2, expert=4))
    assert_allclose(np.asarray(divided(ids)), rounded, atol=1e-4 * np.abs(rounded).max(), rtol=0)


def test_what_cannot_be(mini8, monkeypatch):
    """Told before any weight is read."""
    monkeypatch.setattr("maverick_jax.checkpoint._read_orbax", None)
    monkeypatch.setattr("maverick_jax.checkpoint._read_slices", None)
    with pytest.raises(UserError, match="activations is 'int8': it must be fp8, or None"):
        mj.load(mini8, activations="int8")
    with pytest.raises(UserError, match="this model's routed experts are not: `maverick convert --format fp8`"):
        mj.load(activations="fp8")


def test_a_stack_is_laid_with_its_inputs_together():
    """The same numbers in the same shape; only where their bytes lie is another matter."""
    values = stack("fp8", 2, 128, 16).values
    expected = np.asarray(values, np.float32)
    laid = inputs_together(jnp.copy(values))
    assert laid.format.layout.major_to_minor == (0, 2, 1)
    assert_allclose(np.asarray(laid, np.float32), expected, atol=0, rtol=0)
