"""float32 stays float32, whatever a platform multiplies faster: in the forms of all platforms, which are traced on each of them."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.typing import DTypeLike

import maverick_jax
from maverick_jax.ops.attention import Keys, attend, attend_in_order
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.linear import linear
from maverick_jax.ops.paged_attention import over_pages
from maverick_jax.ops.pages import Pages
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, quantized_shapes
from oracle.plain import PATCH, SIDE, VISION, plain_model

E, K, N, HEADS, D = 4, 1024, 256, 2, 128
HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def products(jaxpr: Jaxpr, dtype: DTypeLike = jnp.float32) -> Iterator[tuple[str, object]]:
    """Name and precision of every product of the dtype, in kernels and in all branches."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if "precision" in equation.params and any(v.aval.dtype == dtype for v in equation.invars[:2]):
            yield name, equation.params["precision"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from products(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, dtype)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def quantized(name: str, shape: tuple[int, ...], experts: bool) -> QuantizedArray:
    form = FORMATS[name]
    values, scales = quantized_shapes(shape, form, outputs=1, experts=experts)
    return QuantizedArray(jax.ShapeDtypeStruct(values, form.values), jax.ShapeDtypeStruct(scales, form.scales))


def experts_and_gradient(x, weight, sizes):
    y, pull = jax.vjp(lambda x: grouped_matmul(x, weight, sizes), x)
    return y, pull(y)


def whole_model(ids, tiles):
    """Text and a picture, and the gradient of its pixels."""
    model = plain_model(vision=VISION, num_hidden_layers=2)
    return jax.value_and_grad(lambda tiles: model(ids, tiles).sum())(tiles)


def over_all_pages(query, key, value, table, limit):
    return over_pages(query, Pages(key, value), table, limit, page=128, first=jnp.int32(0))


def masked(query, positions, key, value):
    return attend(query, positions, Keys(key, value, jnp.zeros((1, key.shape[2]), jnp.int32)), 512)


CASES: dict[str, tuple[Callable, list]] = {
    **{f"{rows} rows": (linear, [f32(rows, K), f32(K, 4096)]) for rows in (1, 8, 100)},
    **{f"{name} rows": (linear, [f32(8, K), quantized(name, (K, 4096), False)]) for name in FORMATS},
    "experts": (experts_and_gradient, [f32(64, K), f32(E, K, N), i32(E)]),
    "an expert's gradient": (
        lambda x, w, sizes: jax.grad(lambda w: grouped_matmul(x, w, sizes).sum())(w),
        [f32(64, K), f32(E, K, N), i32(E)],
    ),
    **{f"{name} experts": (experts_and_gradient, [f32(64, K), quantized(name, (E, K, N), True), i32(E)]) for name in FORMATS},
    "a long prompt": (lambda q, k, v: attend_in_order(q, k, v, None), [f32(1, 1024, HEADS, D), *[f32(1, HEADS, 1024, D)] * 2]),
    "masks": (masked, [f32(1, 8, HEADS, D), i32(1, 8), *[f32(1, HEADS, 1024, D)] * 2]),
    **{
        f"{tokens} tokens over pages": (
            over_all_pages,
            [f32(2, tokens, HEADS, D), *[f32(8, HEADS, 128, D)] * 2, i32(2, 4), i32(2, tokens)],
        )
        for tokens in (1, 64)
    },
    "a model": (whole_model, [jnp.array([[5, PATCH, 7, 8]]), f32(1, 3, SIDE, SIDE)]),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_is_float32(case):
    """On an NVIDIA GPU the tiny models would be off by 6e-3, on a TPU more."""
    function, arguments = CASES[case]
    found = set(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert found
    assert {precision for _, precision in found} == {HIGHEST}, found


def test_bfloat16_asks_for_nothing():
    x, w = jax.ShapeDtypeStruct((8, K), jnp.bfloat16), jax.ShapeDtypeStruct((K, N), jnp.bfloat16)
    ((_, precision),) = products(jax.make_jaxpr(linear)(x, w).jaxpr, jnp.bfloat16)
    assert precision is None


def test_all_products_are_made_in_one_place():
    """`ragged_dot` apart, and there the precision is looked up."""
    package = Path(maverick_jax.__file__).parent
    others = {"dot", "dot_general", "einsum", "matmul", "tensordot", "vdot", "inner", "conv_general_dilated", "conv"}
    found = []
    for part in ("ops", "model", "sharding", "inference", "training"):
        for path in (package / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("jnp", "lax")
                if (named and node.attr in others) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)):
                    found.append(f"{path.relative_to(package)}:{node.lineno}")
    assert {place.partition(":")[0] for place in found} == {"ops/product.py"}, found
