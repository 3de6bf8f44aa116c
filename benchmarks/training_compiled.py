"""What the TPU and GPU compilers make of a training step of the whole Maverick, without a TPU or GPU.

A step learns from 64 rows of 8,192 tokens, by AdamW, with all within a layer made again in the backward pass. `--layers 4 8` compiles so
many layers and adds their difference, a period of Maverick's layers, until there are 48; `--layers 48` compiles them all.

HBM traffic and collectives are counted as `maverick plan --compile` counts them. Computing takes at least the products of `training.flops`
and the forward pass again, at the chip's peak; HBM its traffic; links what goes over them, as if all of a chip were used alike. Of the MFU
the longest of these is a bound. `≥`: loops whose length a TPU's text does not say are counted once (the pieces of the logits).

examples:
  JAX_PLATFORMS=cpu python benchmarks/training_compiled.py                                       # every row of the table
  JAX_PLATFORMS=cpu python benchmarks/training_compiled.py --case v5p-full --layers 48
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maverick_jax.config import Config
from maverick_jax.model.low_rank import add_adapters
from maverick_jax.plan.compiled import Compiled, compile_program, target_mesh
from maverick_jax.plan.programs import Program
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.weights import abstract_model
from maverick_jax.sharding import TRAINING, AttendOnMesh, Constrain, make_dispatcher
from maverick_jax.training.batch import Batch
from maverick_jax.training.flops import flops_per_token
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.split import Split
from maverick_jax.training.step import Progress, abstract_moments, compile_update, make_update
from maverick_jax.training.trainer import REMAT

ROWS, TOKENS, PERIOD = 64, 8192, 4
RANKS = {"attention": 16, "dense": 16, "shared": 16, "experts": 4}
QUICK = {"exec_time_optimization_effort": -1.0}  # the TPU compiler takes seven times as long without it, for the same memory
HEADER = "| case | mesh | arguments | temporaries | HBM | collectives | TFLOP | compute, HBM, links | MFU | compiled in |"


class Case(NamedTuple):
    """`micro` batches are accumulated; `learned` is in float32 beside moments in float32, or adapters beside a base of `dtype`."""

    topology: str
    mesh: tuple[int, int, int]
    adapters: bool
    dtype: str = "bfloat16"
    micro: int = 1


CASES = {
    "v5p-full": Case("v5p:4x4x8", (2, 32, 2), adapters=False),
    "v5p-lora": Case("v5p:4x4x8", (2, 32, 2), adapters=True),
    "v5p-fp8": Case("v5p:4x4x8", (2, 32, 2), adapters=True, dtype="fp8"),
    "v5p-int4": Case("v5p:4x4x8", (2, 32, 2), adapters=True, dtype="int4"),
    "h200-lora": Case("h200:8", (1, 8, 1), adapters=True, micro=8),
    "h200-fp8": Case("h200:8", (1, 8, 1), adapters=True, dtype="fp8", micro=8),
    "h200-int4": Case("h200:8", (1, 8, 1), adapters=True, dtype="int4", micro=8),
}


def first_layers(number: int) -> Config:
    """Maverick's text decoder, cut off behind so many layers."""
    config = dataclasses.replace(Config.maverick(), vision=None)
    kept = {name: tuple(i for i in getattr(config.text, name) if i < number) for name in ("moe_layers", "nope_layers")}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=number, **kept))


def program(case: Case, config: Config, packed: bool) -> tuple[Program, jax.sharding.Mesh]:
    """A training step, described by shapes and shardings alone."""
    mesh = target_mesh(Topology.parse(case.topology), case.mesh)
    parts = {"attend": AttendOnMesh(mesh, TRAINING), "constrain": Constrain(mesh, TRAINING)}
    model = abstract_model(config, case.dtype, dispatcher=make_dispatcher(mesh, TRAINING, training=True), **parts)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        place = TRAINING.sharding(leaf.get_metadata()["axes"], leaf.shape, mesh)
        leaf.set_value(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))
    if case.adapters:
        add_adapters(model, RANKS)
    model.text.remat = REMAT["layers"]
    split, optimizer = Split(model), Optimization(steps=1000).optimizer()
    masters: Any = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for name, x in split.learned.items()}
    progress = Progress(masters, abstract_moments(masters, optimizer))
    update = compile_update(make_update(split, NextToken(), optimizer), progress)
    return Program("training step", update, (progress, split.frozen, batches(case, mesh, packed))), mesh


def batches(case: Case, mesh: jax.sharding.Mesh, packed: bool) -> Batch:
    """[micro, rows, tokens]"""
    rows = ROWS // case.micro
    place = NamedSharding(mesh, PartitionSpec(None, *TRAINING.spec(("batch",), (rows,), mesh)))
    whole, lengths = (case.micro, rows, TOKENS), (case.micro, rows)
    kinds = [(whole, jnp.int32), (lengths, jnp.int32), (whole, jnp.int32), (whole, jnp.float32), *([(whole, jnp.int32)] if packed else [])]
    arrays: Any = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in kinds)
    return Batch(*arrays)


class Figures(NamedTuple):
    """Of one device and step, in bytes; the kinds of collectives by count and payload."""

    arguments: float
    temporaries: float
    hbm: float
    collectives: dict[str, tuple[float, float]]
    at_least: bool
    seconds: float

    @classmethod
    def of(cls, done: Compiled) -> "Figures":
        collectives = {kind: (float(c.count), float(c.payload)) for kind, c in done.traffic.collectives.items()}
        return cls(done.arguments, done.temporaries, done.traffic.hbm, collectives, done.traffic.loops_counted_once > 0, done.seconds)

    def further(self, fewer: "Figures", times: float) -> "Figures":
        """With the layers that `fewer` lacks so many times more."""

        def line(more: float, less: float) -> float:
            return more + times * (more - less)

        arguments, temporaries, hbm = (line(getattr(self, name), getattr(fewer, name)) for name in ("arguments", "temporaries", "hbm"))
        of_none = (0.0, 0.0)
        kinds = {
            kind: (line(count, fewer.collectives.get(kind, of_none)[0]), line(size, fewer.collectives.get(kind, of_none)[1]))
            for kind, (count, size) in self.collectives.items()
        }
        return Figures(arguments, temporaries, hbm, kinds, self.at_least, self.seconds + fewer.seconds)


def measure(case: Case, layers: list[int], packed: bool) -> Figures:
    found = []
    for number in layers:
        step, mesh = program(case, first_layers(number), packed)
        on_tpu = not Topology.parse(case.topology).chip.is_gpu
        found.append(Figures.of(compile_program(step, mesh, QUICK if on_tpu else {})))
    if len(found) == 1:
        return found[0]
    whole = Config.maverick().text.num_hidden_layers
    return found[1].further(found[0], (whole - layers[1]) / (layers[1] - layers[0]))


def row(name: str, case: Case, found: Figures) -> str:
    """One line of the table."""
    topology, gb = Topology.parse(case.topology), 1e9
    chip, tokens = topology.chip, ROWS * TOKENS / topology.devices
    counted = tokens * flops_per_token(dataclasses.replace(Config.maverick(), vision=None), TOKENS, adapters_only=case.adapters)
    made = counted * (3 / 2 if case.adapters else 4 / 3)  # the forward pass once more
    over_links = sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in found.collectives.items())
    times = (made / chip.flops, found.hbm / chip.bandwidth, over_links / chip.link)
    least = "≥ " if found.at_least else ""
    collectives = ", ".join(f"{count:.0f} {kind} {size / gb:.1f} GB" for kind, (count, size) in sorted(found.collectives.items()))
    cells = [name, "data={},expert={},tensor={}".format(*case.mesh), f"{found.arguments / gb:.1f}", f"{found.temporaries / gb:.1f}"]
    cells += [f"{least}{found.hbm / gb:,.0f}", f"{least}{collectives}", f"{made / 1e12:.0f}", ", ".join(f"{t:.2f} s" for t in times)]
    cells += [f"≤ {counted / chip.flops / max(times):.0%}", f"{found.seconds:.0f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), action="append")
    parser.add_argument("--layers", type=int, nargs="+", default=[PERIOD, 2 * PERIOD], help="one number: all there are; two: see above")
    parser.add_argument("--packed", action="store_true", help="several documents per row, as `maverick train sft` lays them")
    args = parser.parse_args()
    print(f"jax {jax.__version__}; {ROWS} rows of {TOKENS} tokens per step; layers {args.layers}; sizes in GB per device\n")
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for name in args.case or CASES:
        print(row(name, CASES[name], measure(CASES[name], args.layers, args.packed)), flush=True)


if __name__ == "__main__":
    main()
