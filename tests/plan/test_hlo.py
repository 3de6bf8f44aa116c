"""HBM bytes and collectives of compiled programs: every clause of the rule on a text counted by hand, and real compilers' texts."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from maverick_jax.errors import UserError
from maverick_jax.plan.hlo import Collective, Traffic, count_traffic

F32 = 8 * 128 * 4  # bytes of f32[8,128]
ROW = 128 * 4  # bytes of one of its rows
INDEX = 4  # bytes of s32[]


def computation(head: str, *instructions: str) -> str:
    return "\n".join([f"{head} (p: f32[]) -> f32[] {{", *(f"  {line}" for line in instructions), "}", ""])


def counted(*entry: str, others: tuple[str, ...] = ()) -> Traffic:
    """Traffic of a program whose other computations stand behind the entry: their order must not matter."""
    return count_traffic("\n".join(["HloModule m, is_scheduled=true", "", computation("ENTRY %main", *entry), *others]))


P0, P1 = "%p0 = f32[8,128]{1,0} parameter(0)", "%p1 = f32[8,128]{1,0} parameter(1)"
I, J = "%i = s32[] parameter(2)", "%j = s32[] constant(0)"


# ---- what is read and written -------------------------------------------------------------------------------------


def test_a_fusion_reads_its_operands_and_writes_its_result():
    """The intermediate result of the fusion stays on the chip."""
    fused = computation("%fused", P0, P1, "%m = f32[8,128] multiply(%p0, %p1)", "ROOT %c = bf16[8,128] convert(%m)")
    traffic = counted(P0, P1, "ROOT %f = bf16[8,128]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%fused", others=(fused,))
    assert (traffic.read, traffic.written, traffic.hbm) == (2 * F32, F32 // 2, 2 * F32 + F32 // 2)


def test_memory_on_the_chip_costs_nothing():
    """A TPU's S(1) is vector memory; S(0) and no mark are HBM."""
    traffic = counted(
        "%p0 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)",
        "%p1 = f32[8,128]{1,0:T(8,128)S(0)} parameter(1)",
        "%a = f32[8,128]{1,0:T(8,128)S(1)} add(%p0, %p1)",
        "ROOT %b = f32[8,128]{1,0:T(8,128)} negate(%a)",
    )
    assert (traffic.read, traffic.written) == (F32, F32)


@pytest.mark.parametrize(
    "instruction", ["dynamic-slice(%c, %z)", "dynamic-update-slice(%c, %c, %z)", "fusion(%c), kind=kLoop, calls=%fused"]
)
def test_slices_and_updates_on_the_chip_cost_nothing(instruction):
    """What a slice takes out of on-chip memory must not be charged to HBM because slices are counted by their result."""
    fused = computation("%fused", P0, "ROOT %d = f32[8,128] dynamic-update-slice(%p0, %p0, %z)")
    traffic = counted(
        "%c = f32[8,128]{1,0:S(1)} parameter(0)",
        "%z = s32[]{:S(6)} parameter(1)",
        f"ROOT %r = f32[8,128]{{1,0:S(1)}} {instruction}",
        others=(fused,),
    )
    assert traffic.hbm == 0


def test_a_fusion_that_only_renames_reads_everything():
    fused = computation("%fused", P0, "ROOT %b = f32[1024] bitcast(%p0)")
    assert counted(P0, "ROOT %f = f32[1024] fusion(%p0), kind=kLoop, calls=%fused", others=(fused,)).read == F32


@pytest.mark.parametrize("there, here, moved", [("S(1)", "", (F32, 0)), ("", "S(1)", (0, F32)), ("", "", (F32, F32))])
def test_an_asynchronous_copy_counts_once(there, here, moved):
    """Start and done print the same arrays: counting both would double every prefetch. The destination comes first."""
    source, target = f"f32[8,128]{{1,0:T(8,128){here}}}", f"f32[8,128]{{1,0:T(8,128){there}}}"
    traffic = counted(
        f"%p0 = {source} parameter(0)",
        f"%s = ({target}, {source}, u32[]{{:S(2)}}) copy-start(%p0)",
        f"ROOT %d = {target} copy-done(%s)",
    )
    assert (traffic.read, traffic.written) == moved


@pytest.mark.parametrize("start", ["slice-start(%p0), slice={[0:2]}", "async-start(%p0), calls=%wrapped"])
def test_an_asynchronous_slice_reads_the_slice(start):
    """A weight that is brought in by parts is read once, not once per part."""
    wrapped = computation("%wrapped", P0, "ROOT %s = f32[2,128] slice(%p0), slice={[0:2]}")
    traffic = counted(
        P0,
        f"%s = ((f32[8,128]), f32[2,128]{{1,0:S(1)}}, s32[]{{:S(2)}}) {start}",
        "ROOT %d = f32[2,128]{1,0:S(1)} slice-done(%s)",
        others=(wrapped,),
    )
    assert (traffic.read, traffic.written) == (2 * ROW, 0)


def test_a_dynamic_update_slice_writes_its_update():
    """Appending one key to a cache must not cost the cache."""
    traffic = counted(
        P0,
        "%u = f32[1,128] parameter(1)",
        I,
        J,
        "ROOT %d = f32[8,128] dynamic-update-slice(%p0, %u, %i, %j)",
    )
    assert (traffic.read, traffic.written) == (ROW + 2 * INDEX, ROW)


UPDATE = (P0, "%u = f32[1,128] parameter(1)", I, J, "%b = f32[8,128] bitcast(%p0)")


@pytest.mark.parametrize("update", ["dynamic-update-slice(%b, %u, %i, %j)", "scatter(%b, %i, %u), to_apply=%add"])
@pytest.mark.parametrize("called", ["%fused", "%outer"])
def test_a_fusion_updates_in_place(update, called):
    """Renamed before and after, or in a fusion of a fusion: the whole operand is neither read nor written."""
    fused = computation("%fused", *UPDATE, f"%d = f32[8,128] {update}", "ROOT %r = f32[8,128] bitcast(%d)")
    outer = computation("%outer", *UPDATE[:3], "ROOT %f = f32[8,128] fusion(%p0, %u, %i), kind=kLoop, calls=%fused")
    call = f"ROOT %f = f32[8,128] fusion(%p0, %u, %i), kind=kLoop, calls={called}"
    traffic = counted(*UPDATE[:3], call, others=(fused, outer))
    assert (traffic.read, traffic.written) == (ROW + INDEX, ROW)


def test_a_fusion_with_several_results_updates_one_in_place():
    """Keys appended and their sum: update and sum are written; what lies on the chip is not."""
    fused = computation(
        "%fused",
        *UPDATE,
        "%d = f32[8,128] dynamic-update-slice(%b, %u, %i, %j)",
        "%s = f32[128] reduce(%u, %j), dimensions={0}, to_apply=%add",
        "%n = f32[1,128] negate(%u)",
        "ROOT %t = (f32[8,128], f32[128], f32[1,128]) tuple(%d, %s, %n)",
    )
    result = "(f32[8,128]{1,0}, f32[128]{0}, f32[1,128]{1,0:S(1)})"
    traffic = counted(*UPDATE[:3], f"ROOT %f = {result} fusion(%p0, %u, %i), kind=kLoop, calls=%fused", others=(fused,))
    assert (traffic.read, traffic.written) == (ROW + INDEX, ROW + ROW)


def test_a_fusion_that_only_has_several_results_writes_them():
    fused = computation("%fused", P0, "%n = f32[8,128] negate(%p0)", "ROOT %t = (f32[8,128], f32[8,128]) tuple(%n, %n)")
    call = "ROOT %f = (f32[8,128]{1,0}, /*index=1*/f32[8,128]{1,0:S(1)}) fusion(%p0), kind=kLoop, calls=%fused"
    traffic = counted(P0, call, others=(fused,))
    assert (traffic.read, traffic.written) == (F32, F32)


@pytest.mark.parametrize("opcode", ["gather(%p0, %i)", "dynamic-slice(%p0, %i)"])
def test_a_gather_reads_what_it_takes_out(opcode):
    """The embedding of sixty tokens does not read the vocabulary."""
    traffic = counted(P0, I, f"ROOT %g = f32[2,128] {opcode}")
    assert (traffic.read, traffic.written) == (2 * ROW + INDEX, 2 * ROW)


@pytest.mark.parametrize("other, read", [("negate(%s)", 2 * ROW), ("reduce(%p0, %k)", F32)])
@pytest.mark.parametrize("called", ["%fused", "%outer"])
def test_a_fusion_reads_the_slice_that_it_takes(other, read, called):
    """One layer of stacked weights, unless another instruction of the fusion looks at all of them."""
    k = "%k = s32[]{:S(6)} parameter(1)"
    fused = computation("%fused", P0, k, "%s = f32[2,128] dynamic-slice(%p0, %k)", f"ROOT %r = f32[2,128] {other}")
    outer = computation("%outer", P0, k, "ROOT %f = f32[2,128] fusion(%p0, %k), kind=kLoop, calls=%fused")
    traffic = counted(P0, k, f"ROOT %f = f32[2,128] fusion(%p0, %k), kind=kOutput, calls={called}", others=(fused, outer))
    assert (traffic.read, traffic.written) == (read, 2 * ROW)


def test_a_grouped_matmul_reads_all_local_experts():
    """A kernel's text does not say which experts have tokens; the weights in HBM are the upper bound."""
    traffic = counted(
        "%x = bf16[16,128] parameter(0)",
        "%w = bf16[4,128,256] parameter(1)",
        "%g = s32[4]{0:S(1)} parameter(2)",
        'ROOT %y = bf16[16,256] custom-call(%g, %x, %w), custom_call_target="tpu_custom_call"',
    )
    assert (traffic.read, traffic.written) == (16 * 128 * 2 + 4 * 128 * 256 * 2, 16 * 256 * 2)
    assert traffic.custom_calls == {"tpu_custom_call": 1}


@pytest.mark.parametrize(
    "result, aliasing, moved",
    [
        ("f32[8,128]", "", (2 * F32, F32)),
        ("f32[8,128]", ", output_to_operand_aliasing={{}: (1, {})}", (F32, 0)),
        ("(f32[8,128], f32[8,128])", ", output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}", (0, 0)),
    ],
)
def test_a_custom_call_in_place(result, aliasing, moved):
    """A kernel that appends to the cache takes the cache and returns it; only its other operands are counted."""
    traffic = counted(P0, P1, f'ROOT %y = {result} custom-call(%p0, %p1), custom_call_target="append"{aliasing}')
    assert (traffic.read, traffic.written) == moved


# ---- how often ----------------------------------------------------------------------------------------------------


BODY = computation("%body", P0, "ROOT %n = f32[8,128] negate(%p0)")
OUTER = computation(
    "%outer", P0, 'ROOT %w = f32[8,128] while(%p0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}'
)


@pytest.mark.parametrize(
    "attributes, runs, loops, once",
    [
        ('body=%body, backend_config={"known_trip_count":{"n":"12"}}', 12, 1, 0),
        ('body=%outer, backend_config={"known_trip_count":{"n":"12"}}', 60, 2, 0),
        ("body=%body", 1, 1, 1),
    ],
)
def test_a_loop_counts_by_its_trips(attributes, runs, loops, once):
    """A scan over layers reads every layer; the text prints one body. An unknown count is said, not guessed."""
    traffic = counted(P0, f"ROOT %w = f32[8,128] while(%p0), condition=%c, {attributes}", others=(BODY, OUTER))
    assert (traffic.read, traffic.written) == (runs * F32, runs * F32)
    assert (traffic.loops, traffic.loops_counted_once) == (loops, once)
    assert [row.count for row in traffic.rows] == [runs]
    assert traffic.launches == runs


def test_a_call_counts_where_it_is_called():
    traffic = counted(P0, "%a = f32[8,128] call(%p0), to_apply=%body", "ROOT %b = f32[8,128] call(%a), to_apply=%body", others=(BODY,))
    assert (traffic.read, traffic.written) == (2 * F32, 2 * F32)


def test_a_conditional_is_not_looked_into():
    """Which branch runs, the text does not say; neither is guessed."""
    call = "ROOT %r = f32[8,128] conditional(%i, %p0, %p0), branch_computations={%body, %body}"
    assert counted(P0, I, call, others=(BODY,)).hbm == 0


def test_names_for_the_same_memory_cost_nothing():
    traffic = counted(
        P0,
        "%b = f32[1024] bitcast(%p0)",
        "%t = (f32[8,128], f32[1024]) tuple(%p0, %b)",
        "%g = f32[1024] get-tuple-element(%t), index=1",
        "ROOT %o = f32[1024] opt-barrier(%g)",
    )
    assert traffic == Traffic(0, 0, {}, (), 0, 0, {}, 0)


# ---- collectives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction, kind, payload",
    [
        ("f32[8,128] all-to-all(%p0), dimensions={0}", "all-to-all", F32),
        ("f32[8,128] all-reduce(%p0), to_apply=%add", "all-reduce", F32),
        ("f32[2,128] reduce-scatter(%p0), to_apply=%add", "reduce-scatter", F32),
        ("f32[32,128] all-gather(%p0), dimensions={0}", "all-gather", 4 * F32),
        ("(f32[8,128], f32[32,128]) all-gather-start(%p0), dimensions={0}", "all-gather", 4 * F32),
        ("((f32[8,128]), f32[8,128]) all-to-all-start(%p0), dimensions={0}", "all-to-all", F32),
        ("f32[8,128] all-reduce-start(%p0), to_apply=%add", "all-reduce", F32),
        ("((f32[8,128]), f32[8,128], u32[]{:S(2)}) async-start(%p0), calls=%exchange", "all-to-all", F32),
        ("f32[8,128] fusion(%p0), kind=kCustom, calls=%exchange", "all-to-all", F32),
        ("f32[2,128] fusion(%p0), kind=kCustom, calls=%scatter", "reduce-scatter", F32),
    ],
)
def test_a_collective_is_found_however_it_is_printed(instruction, kind, payload):
    """At once, started, wrapped or fused. Its payload is what one device gives, an all-gather's is what it receives."""
    exchange = computation("%exchange", P0, "ROOT %e = f32[8,128] all-to-all(%p0), dimensions={0}")
    scatter = computation(
        "%scatter", P0, "%a = f32[8,128] all-reduce(%p0)", "%i = s32[] iota()", "ROOT %e = f32[2,128] dynamic-slice(%a, %i)"
    )
    traffic = counted(P0, f"%s = {instruction}", "ROOT %d = f32[8,128] async-done(%s)", others=(exchange, scatter))
    assert traffic.collectives == {kind: Collective(1, payload)}


def test_collectives_in_loops_count_by_the_trips():
    body = computation("%body", P0, "ROOT %r = f32[8,128] all-reduce(%p0), to_apply=%add")
    loop = "%w = f32[8,128] while(%p0), condition=%c, body=%body, "
    traffic = counted(
        P0,
        loop + 'backend_config={"known_trip_count":{"n":"3"}}',
        "ROOT %r = f32[8,128]{1,0:S(1)} all-reduce(%w), to_apply=%add",
        others=(body,),
    )
    assert traffic.collectives == {"all-reduce": Collective(4, 4 * F32)}
    assert (traffic.read, traffic.written) == (4 * F32, 3 * F32)


def test_a_started_collective_on_a_gpu_writes_its_result():
    """Its type lists operand and result: half of them is written."""
    start = "%s = ((f32[8,128]), f32[8,128]) all-to-all-start(%p0), dimensions={0}"
    traffic = counted(P0, start, "ROOT %d = f32[8,128] all-to-all-done(%s)")
    assert (traffic.read, traffic.written) == (F32, F32)


# ---- sizes, rows, mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, nbytes",
    [("pred", 64), ("s4", 32), ("u4", 32), ("s8", 64), ("f8e4m3fn", 64), ("f8e5m2", 64), ("bf16", 128), ("f32", 256), ("s64", 512)],
)
def test_sizes(dtype, nbytes):
    """FP8 and int4 weights are read with their own size, or quantization would look free or useless."""
    traffic = counted(f"%p = {dtype}[64]{{0:T(512)(128)(8,1)E(4)}} parameter(0)", "ROOT %n = s32[]{:S(6)} popcnt(%p)")
    assert traffic.read == nbytes


def test_rows_put_the_layers_together():
    """Forty-eight layers are one line for a person, with the sum of their bytes; the lines sum to the traffic."""
    traffic = counted(
        P0,
        '%a = f32[8,128] negate(%p0), metadata={op_name="jit(f)/layers_0/neg"}',
        '%b = f32[8,128] negate(%a), metadata={op_name="jit(f)/layers_1/neg"}',
        '%c = f32[2,128] slice(%b), slice={[0:2]}, metadata={op_name="jit(f)/slice"}',
        'ROOT %d = f32[8,128]{1,0:S(1)} pad(%c), metadata={op_name="jit(f)/pad"}',
    )
    assert [(row.bytes, row.opcode, row.count, row.op_name) for row in traffic.rows] == [
        (4 * F32, "negate", 2, "jit(f)/layers_#/neg"),
        (4 * ROW, "slice", 1, "jit(f)/slice"),
        (2 * ROW, "pad", 1, "jit(f)/pad"),
    ]
    assert traffic.rows[2].shapes == "(f32[2,128]) -> f32[8,128]S(1)"
    assert sum(row.bytes for row in traffic.rows) == traffic.hbm


def test_a_row_names_the_largest_operands():
    """A grouped matmul takes five index arrays before its weights; a row that shows only those tells nothing."""
    indices = [f"%i{n} = s32[{n}] parameter({n})" for n in range(1, 6)]
    call = "ROOT %y = f32[8,128] custom-call(%i1, %i2, %i3, %i4, %i5, %p0)"
    assert counted(P0, *indices, call).rows[0].shapes == "(f32[8,128], s32[5], s32[4], s32[3], ...) -> f32[8,128]"


def test_another_text_is_refused():
    with pytest.raises(UserError, match=r"no ENTRY in 25 characters; pass what `compiled.as_text"):
        count_traffic("func.func @main() { ... }")


# ---- real compilers -----------------------------------------------------------------------------------------------


def compiled(function, *arguments, **options) -> Traffic:
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    assert text
    return count_traffic(text)


def scan(x, weights):
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def append(cache, keys, index):
    return jax.lax.dynamic_update_slice(cache, keys, (0, index, 0))


@pytest.mark.parametrize(
    "function, shapes, loops",
    [
        (jnp.matmul, [(64, 128), (128, 256)], 0),
        (scan, [(8, 128), (5, 128, 128)], 1),
        (lambda x, i: jnp.sort(x[jnp.argsort(i[:, 0])], axis=-1), [(64, 128), (64, 1)], 0),
        (lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([8, 24, 0, 32])), [(64, 128), (4, 128, 64)], None),
    ],
)
def test_programs_for_the_cpu(function, shapes, loops):
    """Another compiler's text comes through, and what is certain holds: every operand is read at least once."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traffic = compiled(function, *arguments)
    assert traffic.read >= sum(4 * np.prod(shape) for shape in shapes)
    assert loops is None or (traffic.loops, traffic.loops_counted_once) == (loops, 0)
    assert sum(row.bytes for row in traffic.rows) == traffic.hbm


def exchanged(devices, rows: int) -> Traffic:
    """Every device sends a part of its rows, of 128 floats each, to every other."""
    mesh, spec = Mesh(np.array(devices), ("x",)), PartitionSpec("x")
    exchange = jax.shard_map(lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True), mesh=mesh, in_specs=spec, out_specs=spec)
    return compiled(exchange, jax.ShapeDtypeStruct((rows, 128), jnp.float32, sharding=NamedSharding(mesh, spec)))


def test_collectives_for_the_cpu():
    """Eight simulated devices with 16 rows each."""
    assert exchanged(jax.devices(), rows=128).collectives == {"all-to-all": Collective(1, 16 * ROW)}


@pytest.fixture(scope="module")
def tpus():
    """The four chips of a slice that need not be there: libtpu compiles for it."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' compiles for TPUs that are not there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may be compiling
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v6e-4")
        yield topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices


def test_a_matmul_for_the_tpu(tpus):
    """Both operands are read once and the product is written once, by whatever way through on-chip memory."""
    where = SingleDeviceSharding(tpus[0])
    a = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=where)
    b = jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16, sharding=where)
    traffic = compiled(jnp.matmul, a, b)
    assert traffic.read == (1024 * 512 + 512 * 2048) * 2
    assert traffic.written == 1024 * 2048 * 2


def test_a_donated_cache_for_the_tpu(tpus):
    """One key of eight heads is written; the cache of a megabyte stays where it is."""
    where = SingleDeviceSharding(tpus[0])
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in [(8, 512, 128), (8, 1, 128)]]
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=where)
    traffic = compiled(append, *arguments, index, donate_argnums=0)
    assert traffic.hbm < 8 * 512 * 128 * 2 / 10
    assert traffic.written >= 8 * 128 * 2


def test_collectives_for_the_tpu(tpus):
    """Four chips with 64 rows each."""
    assert exchanged(tpus, rows=256).collectives == {"all-to-all": Collective(1, 64 * ROW)}


def test_a_kernel_with_lines_of_its_own():
    """A Pallas kernel brings metadata of several lines, the last beginning with a brace: the program goes on behind it."""
    traffic = count_traffic(
        """ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %kernel = f32[256]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/kernel"}
  ROOT %b = f32[256]{0} add(%kernel, %kernel)
}
"""
    )
    assert traffic.custom_calls == {"tpu_custom_call": 1}
    assert (traffic.read, traffic.written) == (1024 + 2 * 1024, 2 * 1024)
