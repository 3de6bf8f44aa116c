"""The grouped matmul's kernels for Hopper: on a card that jax simulates with its memories, threads and races, and compiled for one.

Shape suffixes: R rows, K inputs, N outputs, E experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10 has no other name for it
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose

from maverick_jax.errors import UserError
from maverick_jax.ops import grouped_matmul_hopper, toolkit
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.grouped_matmul_gpu import grouped_matmul_gpu
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, dequantize, quantize, quantized_shapes
from maverick_jax.plan.compiled import target_mesh
from maverick_jax.plan.targets import OPTIONS
from maverick_jax.plan.topology import Topology
from oracle.compiling import on_an_h200

CARD: Any = InterpretGPUParams(detect_races=True)  # reads of what nobody wrote are NaN, reads outside an array fail
ROUNDED = 2**-8  # results once to 8 bits; weights are rounded on both sides
K, N = 256, 128
GROUPS = {  # rows per expert, and of all
    "a tile ends where its group does": ([64, 0, 64], 128),
    "tiles run past their groups": ([7, 100, 33], 150),
    "rows without a group": ([3, 0, 5], 70),
    "fewer rows than a tile": ([1, 2, 0], 3),
    "no group": ([0, 0, 0], 65),
    "sizes beyond the rows": ([20, 0, 1000], 66),
}
simulated = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax simulates transposed and converted tiles since 0.12")


def stack(name: str, experts: int, shape=(K, N)):
    """Matrices in bfloat16 or quantized; those of empty groups are NaN where they can be."""
    random = np.random.default_rng(0)
    matrices = [random.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[0])) for _ in range(experts)]
    if name == "bfloat16":
        return jnp.asarray(np.stack(matrices), jnp.bfloat16)
    parts = zip(*(quantize(matrix, FORMATS[name]) for matrix in matrices), strict=True)
    return QuantizedArray(*(jnp.asarray(np.stack(arrays)) for arrays in parts))


def case(kind: str, width: int):
    """Rows and sizes. Rows without a group are NaN: nobody shall look at them."""
    sizes, rows = GROUPS[kind]
    x_RN = np.random.default_rng(1).standard_normal((rows, width), np.float32)
    x_RN[sum(sizes) :] = np.nan
    return jnp.asarray(x_RN, jnp.bfloat16), jnp.asarray(sizes, jnp.int32)


def slices(sizes, rows):
    ends = np.minimum(np.cumsum(sizes), rows)
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def close(found, expected):
    assert found.dtype == jnp.bfloat16
    assert found.shape == expected.shape
    largest = max(1.0, np.abs(expected).max())
    assert_allclose(np.asarray(found, np.float32), expected, atol=ROUNDED * largest, rtol=0)


def check_product(name, kind, transposed):
    weight = stack(name, len(GROUPS[kind][0]))
    x, sizes = case(kind, N if transposed else K)
    whole = np.asarray(weight if name == "bfloat16" else dequantize(weight, lead=1, dtype=jnp.bfloat16), np.float32)
    expected = np.zeros((len(x), K if transposed else N), np.float32)
    for expert, group in enumerate(slices(sizes, len(x))):
        expected[group] = np.asarray(x[group], np.float32) @ (whole[expert].T if transposed else whole[expert])
    assert grouped_matmul_hopper.suits(x, weight)
    close(grouped_matmul_hopper.product(x, weight, sizes, transposed=transposed, interpret=CARD), expected)


def test_rows_meet_their_own_matrix():
    """On every jax; all the other cases where it simulates more."""
    params = InterpretGPUParams()
    x, sizes = case("tiles run past their groups", K)
    weight = stack("bfloat16", 3)
    found = grouped_matmul_hopper.product(x, weight, sizes, transposed=False, interpret=params)
    expected = np.zeros((len(x), N), np.float32)
    for expert, group in enumerate(slices(sizes, len(x))):
        expected[group] = np.asarray(x[group], np.float32) @ np.asarray(weight[expert], np.float32)
    close(found, expected)


@simulated
@pytest.mark.parametrize("transposed", [False, True], ids=["product", "transposed"])
@pytest.mark.parametrize("kind", GROUPS)
def test_each_row_meets_its_own_matrix_and_no_other(kind, transposed):
    check_product("bfloat16", kind, transposed)


@simulated
@pytest.mark.parametrize("transposed", [False, True], ids=["product", "transposed"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_meet_the_weights_that_are_stood_for(name, transposed):
    """Rounded to the dtype of the rows, as everywhere; int4 has two groups of inputs."""
    check_product(name, "tiles run past their groups", transposed)


@simulated
@pytest.mark.parametrize("kind", GROUPS)
def test_the_gradient_of_the_matrices(kind):
    (x, sizes), (dy, _) = case(kind, K), case(kind, N)
    groups = slices(sizes, len(x))
    expected = np.stack([np.asarray(x[group], np.float32).T @ np.asarray(dy[group], np.float32) for group in groups])
    close(grouped_matmul_hopper.outer_products(x, dy, sizes, interpret=CARD), expected)


@pytest.mark.parametrize("name", ["bfloat16", *FORMATS])
def test_what_a_product_reads_is_kept_until_it_ends(name):
    """jax simulates products that end at once: on a card one that nobody waits for may read what is fetched for a later step."""
    weight = abstract(name, 2, K, N)
    x, dy = (jax.ShapeDtypeStruct((128, width), jnp.bfloat16) for width in (K, N))
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = [jax.make_jaxpr(lambda x, w, sizes: grouped_matmul_hopper.product(x, w, sizes, transposed=False))(x, weight, sizes)]
    traced.append(jax.make_jaxpr(grouped_matmul_hopper.outer_products)(x, dy, sizes))
    for program in traced:
        waits = [waited_for(jaxpr) for jaxpr in inner(program.jaxpr)]
        assert [left for left in waits if left is not None] == [0 if name != "bfloat16" and program is traced[0] else 1]


def inner(jaxpr):
    """A jaxpr, and all of those in it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(getattr(leaf, "jaxpr", leaf), "eqns"):
                yield from inner(getattr(leaf, "jaxpr", leaf))


def waited_for(jaxpr) -> int | None:
    """How many products may still run at its end: what is waited for behind the last; None where there is no product."""
    left = None
    for equation in jaxpr.eqns:
        if equation.primitive.name == "wgmma_ref":
            left = 99
        if equation.primitive.name == "wgmma_wait" and left is not None:
            left = min(left, equation.params["n"] if equation.params else equation.invars[0].val)  # since jax 0.12, and before
    return left


@pytest.mark.parametrize("name", ["bfloat16", *FORMATS])
def test_what_they_take(name):
    """Every division of Maverick's matrices, and of Scout's; not the test models', nor float32."""
    for E, K, N in [(128, 5120, 8192), (16, 8192, 5120), (16, 5120, 1024), (128, 1024, 5120)]:
        assert grouped_matmul_hopper.suits(jax.ShapeDtypeStruct((64, K), jnp.bfloat16), abstract(name, E, K, N))  # type: ignore
    for shape, dtype in [((4, 5120, 200), jnp.bfloat16), ((4, 192, 256), jnp.bfloat16), ((4, 5120, 8192), jnp.float32)]:
        x = jax.ShapeDtypeStruct((64, shape[1]), dtype)
        assert not grouped_matmul_hopper.suits(x, abstract(name, *shape))  # type: ignore


def abstract(name: str, E: int, K: int, N: int):
    if name == "bfloat16":
        return jax.ShapeDtypeStruct((E, K, N), jnp.bfloat16)
    values, scales = quantized_shapes((E, K, N), FORMATS[name], outputs=1, experts=True)
    return QuantizedArray(jax.ShapeDtypeStruct(values, FORMATS[name].values), jax.ShapeDtypeStruct(scales, FORMATS[name].scales))  # type: ignore


def with_gradients(x, weight, sizes, dy):
    y, pull = jax.vjp(lambda x, w: grouped_matmul_gpu(x, w, sizes), x, weight)
    return y, *pull(dy)


def lowered(width: int = 8192) -> str:
    shapes = [((64, 5120), jnp.bfloat16), ((16, 5120, width), jnp.bfloat16), ((16,), jnp.int32), ((64, width), jnp.bfloat16)]
    with on_an_h200():
        traced = jax.jit(lambda *args: with_gradients(*args)).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("chosen", ["", "triton"])
def test_triton_multiplies_unless_mosaic_is_chosen(monkeypatch, chosen):
    monkeypatch.setenv(toolkit.CHOICE, chosen)
    assert "mosaic_gpu" not in lowered()


def test_mosaic_is_chosen_where_it_suits(monkeypatch):
    """Product and both gradients; a width that fills no tile is Triton's."""
    monkeypatch.setenv(toolkit.CHOICE, "mosaic")
    assert lowered().count("mosaic_gpu_v2") == 3
    assert "mosaic_gpu" not in lowered(width=8200)


def test_a_choice_that_cannot_be(monkeypatch):
    """One line that says what to do: a name that is none, and a card that has no such instructions."""
    monkeypatch.setenv(toolkit.CHOICE, "cutlass")
    with pytest.raises(UserError, match="MAVERICK_GPU_KERNELS=cutlass: choose one of triton, mosaic"):
        lowered()
    monkeypatch.setenv(toolkit.CHOICE, "mosaic")

    class A100:
        platform, device_kind, compute_capability = "gpu", "NVIDIA A100-SXM4-80GB", "8.0"

    monkeypatch.setattr(jax, "local_devices", lambda: [A100()])
    with pytest.raises(UserError, match=r"needs compute capability 9.0 \(Hopper\), and NVIDIA A100-SXM4-80GB has 8.0: without it"):
        toolkit.wants_mosaic()


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("name", ["bfloat16", *FORMATS])
def test_an_h200_reads_matrices_where_they_lie(monkeypatch, name, rows):
    """Compiled inside `shard_map`: one kernel, and gradients likewise, without a copy of a stack."""
    try:
        mesh = target_mesh(Topology.parse("h200:8"), (1, 8, 1))
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv(toolkit.CHOICE, "mosaic")
    K, N = 5120, 8192
    weight = abstract(name, 16, K, N)
    arguments = (
        jax.ShapeDtypeStruct((rows, K), jnp.bfloat16),
        weight,
        jax.ShapeDtypeStruct((16,), jnp.int32),
        jax.ShapeDtypeStruct((rows, N), jnp.bfloat16),
    )

    def gradients(x, weight, sizes, dy):
        """Of the rows, and of matrices that have one."""
        if name == "bfloat16":
            return with_gradients(x, weight, sizes, dy)
        y, pull = jax.vjp(lambda x: grouped_matmul(x, weight, sizes), x)
        return y, *pull(dy)

    specs = functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    compiled = jax.jit(specs(gradients)).lower(*arguments).compile(compiler_options=OPTIONS["cuda"])
    assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == (3 if name == "bfloat16" else 2)
    copied = 3 * rows * K * 2 if name == "int4" else 0  # the rows' even and odd inputs, and a gradient's, apart
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6 + copied
