"""The GPU kernels of the grouped matmul, run as ordinary JAX operations, and compiled for a GPU that is not there.

Shape suffixes: R rows, K inputs, N outputs, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from maverick_jax.errors import UserError
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.grouped_matmul_gpu import grouped_matmul_gpu
from maverick_jax.plan.compiled import target_mesh
from maverick_jax.plan.targets import OPTIONS
from maverick_jax.plan.topology import Topology
from oracle.compiling import count_products

# float32 sums in another order; bfloat16 results are rounded to 8 bits once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8}
ROWS, K, N = 150, 130, 200  # no multiple of any block
GROUPS = {  # rows per expert, of 150; those left over belong to none. Same shapes throughout: each kernel is compiled once
    "even": [50, 50, 50],
    "empty groups": [0, 150, 0],
    "rows without a group": [3, 0, 5],
    "no group": [0, 0, 0],
    "blocks end where groups do": [64, 64, 22],
    "blocks end one row off": [65, 1, 63],
}
SHAPES = {  # sizes, R, K, N
    "one row, its sum in parts": ([0, 1], 1, 1024, 24),
    "fewer rows than experts": ([0] * 5 + [1] + [0] * 4 + [2, 0], 3, 24, 70),
    # Of tiles that write past their end, one is overwritten by the next only where they run in order. Here they do not.
    "more tiles than run at once": ([3] * 12, 36, 24, 40),
    "as many tiles as there can be": ([1, 17, 1], 20, 24, 40),
    "no rows": ([0, 0], 0, 24, 40),
}


def case(sizes: list[int], rows: int, k: int, n: int, dtype: str):
    """x, weight, sizes and dy. What must not be looked at is NaN: rows without a group, and matrices of groups without rows."""
    random = np.random.default_rng(0)
    x_RK, dy_RN = (random.standard_normal((rows, width), np.float32) for width in (k, n))
    x_RK[sum(sizes) :] = dy_RN[sum(sizes) :] = np.nan
    weight_EKN = random.standard_normal((len(sizes), k, n), np.float32) / np.sqrt(np.float32(k))
    weight_EKN[np.array(sizes) == 0] = np.nan
    x, weight, dy = (jnp.asarray(a, dtype) for a in (x_RK, weight_EKN, dy_RN))
    return x, weight, jnp.asarray(sizes, jnp.int32), dy


def product_and_gradients(x, weight, sizes, dy):
    y, pull = jax.vjp(lambda x, w: grouped_matmul_gpu(x, w, sizes, True), x, weight)
    return y, *pull(dy)


def by_group(x, weight, sizes, dy):
    """The same, one group after the other."""
    x, weight, dy = (np.asarray(a, np.float32) for a in (x, weight, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(weight)
    start = 0
    for expert, size in enumerate(np.asarray(sizes)):
        group = slice(start, start + size)
        if size:
            y[group], dx[group], dw[expert] = x[group] @ weight[expert], dy[group] @ weight[expert].T, x[group].T @ dy[group]
        start += size
    return y, dx, dw


def check(arguments, dtype):
    for ours, expected in zip(product_and_gradients(*arguments), by_group(*arguments), strict=True):
        assert ours.dtype == jnp.dtype(dtype)
        assert ours.shape == expected.shape
        assert_allclose(np.asarray(ours, np.float32), expected, atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max(initial=0)), rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", GROUPS)
def test_each_row_meets_its_own_matrix_and_no_other(kind, dtype):
    """A tile that runs past its group's end, a row or a matrix read in vain, a row written by none: product or gradients are wrong."""
    check(case(GROUPS[kind], ROWS, K, N, dtype), dtype)


@pytest.mark.parametrize("kind", SHAPES)
def test_other_shapes(kind):
    """Few rows are multiplied in smaller tiles, and very few in parts of the sum; every row has a tile."""
    check(case(*SHAPES[kind], "bfloat16"), "bfloat16")


def test_sizes_beyond_the_rows_write_nothing_outside():
    """On a GPU that would be someone else's memory."""
    x, weight, _, dy = case([20, 130], ROWS, K, N, "float32")
    too_many, cut = (jnp.asarray(sizes, jnp.int32) for sizes in ([20, 1000], [20, 130]))
    for ours, expected in zip(product_and_gradients(x, weight, too_many, dy), product_and_gradients(x, weight, cut, dy), strict=True):
        assert_allclose(ours, expected, atol=0, rtol=0)


@pytest.mark.parametrize("rows,experts,k,n", [(64, 16, 5120, 8192), (64, 128, 1024, 5120)], ids=["experts divided", "width divided"])
def test_an_h200_reads_matrices_where_they_lie(rows, experts, k, n):
    """Maverick's decode: one kernel inside `shard_map`, no product over all experts, no copy; gradients likewise."""
    try:
        mesh = target_mesh(Topology.parse("h200:8"), (1, 8, 1))
    except UserError as error:
        pytest.skip(str(error))
    everywhere = PartitionSpec()

    def with_gradients(x, weight, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, weight)
        return y, *pull(dy)

    shapes = [((rows, k), jnp.bfloat16), ((experts, k, n), jnp.bfloat16), ((experts,), jnp.int32), ((rows, n), jnp.bfloat16)]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, everywhere)) for shape in shapes]
    for function, kernels in ((lambda x, w, sizes, _: grouped_matmul(x, w, sizes), 1), (with_gradients, 3)):
        on_device = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        compiled = jax.jit(on_device).lower(*arguments).compile(compiler_options=OPTIONS["cuda"])
        assert count_products(compiled.as_text()) == kernels
        assert " dot(" not in compiled.as_text()
        assert compiled.memory_analysis().temp_size_in_bytes < 1e6
