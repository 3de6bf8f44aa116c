"""A product is the same however many rows it has: on CPU the number of rows chooses its form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.ops.linear import FEW_ROWS, LEAST_BFLOAT16_ROWS, PARTS, linear, linear_float32
from oracle.programs import arrays_made

LEADING = [(), (1,), (1, 1), (2,), (3,), (2, 3), (FEW_ROWS,), (FEW_ROWS + 1,)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize(("inner", "outer"), [((6,), (5,)), ((3, 2), (5,)), ((6,), (5, 2)), ((4, 2), (5,))], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_rows(dtype, inner, outer, leading):
    """Axes come out in their order, whichever form is taken. These integers are exact in both dtypes, their sums in float32 alone."""
    random = np.random.default_rng(0)
    x, weight = (random.integers(-99, 100, shape) for shape in ((*leading, *inner), (*inner, *outer)))
    contract = len(inner)
    y = jax.jit(lambda x, w: linear_float32(x, w, contract=contract))(jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.tensordot(x, weight, contract))
    assert linear(jnp.asarray(x, dtype), jnp.asarray(weight, dtype), contract=contract).dtype == dtype


def test_gradients_of_few_rows():
    """The form for few rows is written so that the compiler leaves it alone; its gradient is still that of a product."""
    random = np.random.default_rng(0)
    x, weight, dy = (jnp.asarray(random.standard_normal(s, np.float32)) for s in ((4, 6), (6, 5), (4, 5)))
    dx, dweight = jax.jit(jax.grad(lambda x, w: (linear(x, w) * dy).sum(), argnums=(0, 1)))(x, weight)
    assert_allclose(dx, dy @ weight.T, rtol=1e-5, atol=1e-5)
    assert_allclose(dweight, x.T @ dy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inner", "outer"), [((6,), (4, 5)), ((3, 2), (5,))], ids=str)
def test_gradients_of_bfloat16_are_bfloat16_products(inner, outer):
    """Of float32 sums JAX makes the gradient in float32: a GPU would make every weight float32 first, and multiply at half its speed."""
    random = np.random.default_rng(0)
    x, weight, dy = (random.integers(-9, 10, shape) for shape in ((4, 3, *inner), (*inner, *outer), (4, 3, *outer)))
    contract = len(inner)

    def gradients(x, w):
        return jax.grad(lambda x, w: (linear_float32(x, w, contract=contract) * dy.astype(np.float32)).sum(), argnums=(0, 1))(x, w)

    arrays = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    dx, dweight = jax.jit(gradients)(*arrays)
    expected = np.tensordot(dy, weight, (range(2, dy.ndim), range(contract, weight.ndim))), np.tensordot(x, dy, ((0, 1), (0, 1)))
    for found, exact in zip((dx, dweight), expected, strict=True):
        np.testing.assert_array_equal(found, jnp.asarray(exact, jnp.bfloat16))
    products = [line for line in jax.jit(gradients).lower(*arrays).as_text().splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("f32" not in line.split(" : ")[-1].split(" -> ")[0].replace("bf16", "") for line in products)


@pytest.mark.parametrize("rows", [1, 2, LEAST_BFLOAT16_ROWS, FEW_ROWS])
def test_no_product_has_a_single_bfloat16_row(rows):
    """XLA:CPU multiplies it in a naive loop: 43 ms for [512, 32000], where four rows take 1.1."""
    x, weight = jax.ShapeDtypeStruct((rows, 6), "bfloat16"), jax.ShapeDtypeStruct((6, 5), "bfloat16")
    made = arrays_made(jax.jit(linear_float32).lower(x, weight).compile())
    assert [array.shape[0] for array in made if array.by == "dot"] == [max(rows, LEAST_BFLOAT16_ROWS)]


def test_a_single_float32_row_is_multiplied_in_parts():
    """XLA:CPU gives a single row's product by a small matrix to one core: 13 GB/s, where parts of it on both reach 20."""
    x, weight = jax.ShapeDtypeStruct((1, 8), "float32"), jax.ShapeDtypeStruct((8, 5), "float32")
    made = arrays_made(jax.jit(linear_float32).lower(x, weight).compile())
    assert [array.shape for array in made if array.by == "dot"] == [(PARTS, 1, 5)]
