"""The grouped matmul multiplies every row by its own expert's matrix, whatever the groups' sizes.

Shape suffixes: R rows, K inputs, N outputs, E experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.ops import grouped_matmul_tpu
from maverick_jax.ops.grouped_matmul import _grouped_matmul_tpu, grouped_matmul
from maverick_jax.ops.grouped_matmul_tpu import outer_products_tpu
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, quantized_shapes
from oracle.programs import arrays_made

K, N = 24, 40
# float32 sums in another order; bfloat16 results are rounded to 8 bits once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8}
GROUPS = {  # rows per expert, and rows behind them that belong to none
    "even": ([4, 4, 4, 4], 0),
    "empty groups": ([0, 9, 0, 0, 7, 0], 0),
    "one group takes all": ([0, 0, 150, 0], 0),
    "padding rows": ([3, 0, 5], 11),
    "only padding": ([0, 0, 0], 5),
    "one row": ([0, 1, 0], 0),
    "one expert": ([7], 2),
    "uneven blocks": ([65, 1, 130, 64, 63], 9),
    "more experts than rows": ([0] * 60 + [1] + [0] * 60 + [2] + [0] * 8, 1),
}


def case(kind: str, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    sizes, padding = GROUPS[kind]
    random = np.random.default_rng(0)
    x_RK = jnp.asarray(random.standard_normal((sum(sizes) + padding, K), np.float32), dtype)
    weight_EKN = jnp.asarray(random.standard_normal((len(sizes), K, N), np.float32) / np.sqrt(np.float32(K)), dtype)
    return x_RK, weight_EKN, jnp.asarray(sizes, jnp.int32)


def gathered(x_RK, weight_EKN, sizes_E):
    """Row by row in float32: no sorting, no blocks."""
    sizes = np.asarray(sizes_E)
    expert_R = np.repeat(np.arange(len(sizes)), sizes)
    real = x_RK[: len(expert_R)].astype(jnp.float32)
    y = jnp.einsum("RK,RKN->RN", real, weight_EKN.astype(jnp.float32)[expert_R])
    return jnp.concatenate([y, jnp.zeros((x_RK.shape[0] - len(expert_R), N))])


def close(ours, expected, tolerance):
    expected = np.asarray(expected, np.float32)
    assert_allclose(np.asarray(ours, np.float32), expected, atol=tolerance * max(1.0, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", GROUPS)
def test_each_row_meets_its_own_matrix(kind, dtype):
    """A block that runs past its group's end, or a row without a group, leaks into the result."""
    x, w, sizes = case(kind, dtype)
    y = jax.jit(grouped_matmul)(x, w, sizes)
    assert y.dtype == jnp.dtype(dtype)
    close(y, gathered(x, w, sizes), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["empty groups", "padding rows", "uneven blocks"])
def test_gradients(kind, dtype):
    """The hand-written gradient: an idle expert gets zero, padding contributes nothing, no block counts twice."""
    x, w, sizes = case(kind, dtype)
    weigh_RN = jnp.asarray(np.random.default_rng(1).standard_normal((x.shape[0], N), np.float32))

    def loss(product):
        return lambda x, w: (product(x, w, sizes).astype(jnp.float32) * weigh_RN).sum()

    ours = jax.jit(jax.grad(loss(grouped_matmul), argnums=(0, 1)))(x, w)
    expected = jax.grad(loss(gathered), argnums=(0, 1))(x.astype(jnp.float32), w.astype(jnp.float32))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        close(a, b, 2 * TOLERANCE[dtype])


def abstract_weight(kind: str, E: int) -> Any:
    if kind not in FORMATS:
        return jax.ShapeDtypeStruct((E, K, N), kind)
    form = FORMATS[kind]
    values, scales = quantized_shapes((E, K, N), form, outputs=1, experts=True)
    return jax.eval_shape(lambda: QuantizedArray(jnp.zeros(values, form.values), jnp.zeros(scales, form.scales)))


@pytest.mark.parametrize("kind", ["uneven blocks", "empty groups", "padding rows", "only padding"])
def test_gradients_on_a_tpu(monkeypatch, kind):
    """There XLA would multiply all rows once per expert for the gradient of the matrices: a kernel does not, and gives the same."""
    monkeypatch.setattr(grouped_matmul_tpu, "outer_products_tpu", functools.partial(outer_products_tpu, interpret=True))
    x_RK, weight_EKN, sizes_E = case(kind, "bfloat16")
    dy_RN = jnp.asarray(np.random.default_rng(1).standard_normal((len(x_RK), N)), jnp.bfloat16)
    found, expected = (
        jax.vjp(lambda x, w: form(x, w, sizes_E), x_RK, weight_EKN)[1](dy_RN)  # noqa: B023
        for form in (_grouped_matmul_tpu, grouped_matmul)
    )
    for one, other in zip(found, expected, strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        assert_allclose(one, other, atol=TOLERANCE["bfloat16"] * max(1, np.abs(other).max()), rtol=0)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", *FORMATS])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_no_stack_is_copied(kind, gradient):
    """XLA:CPU slices narrow floats by way of float32, and widened or copied all experts in every call: eight times a float32 step."""
    E = 16
    x = jax.ShapeDtypeStruct((5, K), "float16" if kind == "float16" else "bfloat16")

    def run(x, w, sizes):
        return grouped_matmul(x, w, sizes).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(run) if gradient else run).lower(x, abstract_weight(kind, E), jax.ShapeDtypeStruct((E,), "int32"))
    made = arrays_made(program.compile())
    assert made, "nothing was found in the compiled text: the test sees nothing"
    assert [array for array in made if array.shape[:1] == (E,) and array.ndim == 3 and array.shape[1] > 1] == []


@pytest.mark.parametrize("rows", [1, 4])
def test_few_float32_rows_copy_no_matrix(rows):
    """XLA:CPU copies an expert's matrix out of the stack for a product, and a large one for a reduction too."""
    E, K, N = 16, 64, 128
    x, w, sizes = (jax.ShapeDtypeStruct(*what) for what in (((rows, K), "float32"), ((E, K, N), "float32"), ((E,), "int32")))
    made = arrays_made(jax.jit(grouped_matmul).lower(x, w, sizes).compile())
    assert made, "nothing was found in the compiled text: the test sees nothing"
    assert [array for array in made if {K, N} <= set(array.shape)] == []


def test_the_gradient_of_a_bfloat16_stack_is_written_expert_by_expert():
    """Put into a bfloat16 stack, every expert's part made XLA:CPU widen and round the whole of it."""
    E = 16
    x, w, sizes = jax.ShapeDtypeStruct((5, K), "bfloat16"), abstract_weight("bfloat16", E), jax.ShapeDtypeStruct((E,), "int32")
    program = jax.jit(jax.grad(lambda w, x, sizes: grouped_matmul(x, w, sizes).astype(jnp.float32).sum())).lower(w, x, sizes)
    writes = [array for array in arrays_made(program.compile()) if array.shape == (E, K, N) and array.in_loop]
    assert [array.by for array in writes] == ["dynamic-update-slice"]


def test_results_are_written_block_by_block():
    """As above: a bfloat16 array of results would be written whole for every block of rows."""
    x, w, sizes = jax.ShapeDtypeStruct((50, K), "bfloat16"), abstract_weight("bfloat16", 16), jax.ShapeDtypeStruct((16,), "int32")
    writes = [array for array in arrays_made(jax.jit(grouped_matmul).lower(x, w, sizes).compile()) if array.in_loop]
    assert [array.by for array in writes if array.shape[:1] >= (50,)] == ["dynamic-update-slice"]
