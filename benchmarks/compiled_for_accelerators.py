"""What the TPU and GPU compilers make of whole models, without a TPU or GPU: memory, HBM traffic, collectives per device.

HBM traffic is counted from the compiled text (rule: maverick_jax/plan/hlo.py): operands and results outside on-chip memory,
asynchronous copies once, loop bodies times their trips, in-place updates and gathers by their slice, grouped matmuls with all
local experts. Beside it stands the compiler's own `cost_analysis`, which counts staging copies too, or, for GPUs, what a call launches.

examples:
  JAX_PLATFORMS=cpu python benchmarks/compiled_for_accelerators.py                      # every row of the tables
  JAX_PLATFORMS=cpu python benchmarks/compiled_for_accelerators.py --topology v6e:8x8 --model maverick --program decode
  JAX_PLATFORMS=cpu python benchmarks/compiled_for_accelerators.py --topology h100:8 --model maverick --dtype fp8
"""

import argparse

import jax

from maverick_jax.config import Config
from maverick_jax.plan.compiled import Compiled, compile_program, target_mesh
from maverick_jax.plan.programs import Programs
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.weights import DTYPES
from maverick_jax.sharding import get_layout

BATCH, CONTEXT, PREFILL = 64, 8192, 8192
MILLION = 2**20
MESHES = {  # of a topology, by layout: data, expert, tensor
    ("v6e:8x8", "throughput"): (1, 8, 8),
    ("v6e:8x8", "latency"): (1, 8, 8),
    ("v5p:4x4x4", "throughput"): (1, 8, 8),
    ("v5p:4x4x4", "latency"): (1, 8, 8),
    ("h200:8", "throughput"): (1, 8, 1),
    ("h200:8", "latency"): (1, 1, 8),
    ("h100:8", "throughput"): (1, 8, 1),
    ("h100:8", "latency"): (1, 1, 8),
}
VMEM = {"xla_tpu_scoped_vmem_limit_kib": 114688}  # what a kernel may keep on the chip; the default is smaller
HEADER = "| topology | model | layout | program | arguments | temporaries | HBM | x | cost_analysis | collectives | compiled in |"


def row(topology: str, model: str, layout: str, done: Compiled, note: str) -> str:
    """One line of the table, sizes in GB."""
    traffic, gb = done.traffic, 1e9
    collectives = ", ".join(f"{c.count} {kind} {c.payload / 1e6:.1f} MB" for kind, c in sorted(traffic.collectives.items()))
    own = f"{traffic.launches:,} launches" if done.bytes_accessed is None else f"{done.bytes_accessed / gb:.2f}"
    # A text that leaves out how often its loops run bounds the traffic from below.
    least = "≥ " if traffic.loops_counted_once else ""
    cells = [topology, model, layout, f"{done.name}{note}", f"{done.arguments / gb:.2f}", f"{done.temporaries / gb:.3f}"]
    cells += [f"{least}{traffic.hbm / gb:.2f}", f"{least}{traffic.hbm / done.arguments:.2f}", own, collectives, f"{done.seconds:.0f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=sorted({name for name, _ in MESHES}), action="append")
    parser.add_argument("--layout", choices=("throughput", "latency"), action="append")
    parser.add_argument("--model", choices=("maverick", "scout"), action="append")
    parser.add_argument("--program", choices=("decode", "decode-vmem", "prefill", "vision", "million"), action="append")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the weights, as `maverick plan` has them")
    args = parser.parse_args()
    print(f"jax {jax.__version__}; {args.dtype}; batch {BATCH}, context {CONTEXT}; prefill of {PREFILL} tokens, batch 1;")
    print("sizes in GB per device\n")
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for (topology, layout), shape in MESHES.items():
        if topology not in (args.topology or [topology]) or layout not in (args.layout or [layout]):
            continue
        mesh, on_tpu = target_mesh(Topology.parse(topology), shape), not Topology.parse(topology).chip.is_gpu
        for model in args.model or ("maverick", "scout"):
            programs = Programs(getattr(Config, model)(), mesh, get_layout(layout), dtype=args.dtype)
            cases = [("decode", lambda p=programs: p.decode(BATCH, CONTEXT), {}, "")]
            if on_tpu:
                cases += [
                    ("decode-vmem", lambda p=programs: p.decode(BATCH, CONTEXT), VMEM, ", more VMEM"),
                    ("prefill", lambda p=programs: p.prefill(1, PREFILL), {}, ""),
                    ("vision", lambda p=programs: p.vision(), {}, ""),
                ]
            if (topology, layout, model) in (("v5p:4x4x4", "throughput", "maverick"), ("h200:8", "latency", "maverick")):
                cases += [
                    ("million", lambda p=programs: p.decode(1, MILLION), {}, " behind 1M tokens"),
                    ("million", lambda p=programs: p.prefill(1, PREFILL, MILLION, first=False), {}, f" of {PREFILL:,} behind 1M tokens"),
                ]
            for name, program, options, note in cases:
                if name in (args.program or [name]):
                    print(row(topology, model, layout, compile_program(program(), mesh, options), note), flush=True)


if __name__ == "__main__":
    main()
