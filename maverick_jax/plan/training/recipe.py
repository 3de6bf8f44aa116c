"""What is learned, and how a step goes through its rows: what `maverick train` is told.

Which parameters are learned, and how they lie on a mesh, says the model itself, described by shapes alone (`add_adapters`, `Split`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

from flax import nnx

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, whole
from maverick_jax.model.low_rank import add_adapters
from maverick_jax.model.parameter import parameter_name
from maverick_jax.ops.quantize import FORMATS
from maverick_jax.plan.case import Case
from maverick_jax.plan.weights import Kind, abstract_model, kinds
from maverick_jax.training.split import Split

TRAININGS = {"lora": "bfloat16", "qlora": "int4", "full": "bfloat16"}  # and the dtype of the base where none is named
REMATS = ("layers", "products", "none")
STEPS = Range(whole, 1, 2**20, "a whole number from 1")
FLOAT32 = 4
MOMENTS = 2  # of AdamW, both float32, as gradients are
Ranks = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of `maverick train` that memory and speed depend on.

    Attributes:
      training: of `TRAININGS`: adapters on attention, dense, shared and routed experts beside a base as it is, "qlora" beside a quantized
        one; or "full", all weights of the text decoder.
      rank, expert_rank: of the adapters, and of those of routed experts.
      master: what "full" learns is kept in float32.
      remat: what the backward pass makes again, of `REMATS`.
      accumulate: micro-batches of a step.

    Raises:
      UserError: names the setting, its value, and what it must be.
    """

    training: str
    rank: int = 16
    expert_rank: int = 4
    master: bool = False
    remat: str = "layers"
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, known in (("training", tuple(TRAININGS)), ("remat", REMATS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        for name in ("rank", "expert_rank", "accumulate"):
            object.__setattr__(self, name, STEPS.check(name, getattr(self, name)))
        if self.master and self.adapts:
            raise UserError("adapters are learned in float32 as they are: float32 masters are for training full.")

    @property
    def adapts(self) -> bool:
        return self.training != "full"

    @property
    def ranks(self) -> Ranks:
        """Of every component that gets adapters."""
        ranks = {"attention": self.rank, "dense": self.rank, "shared": self.rank, "experts": self.expert_rank}
        return tuple(ranks.items()) if self.adapts else ()

    def check(self, dtype: str) -> None:
        """Refuse a base that this training has no use for."""
        if self.training == "qlora" and dtype not in FORMATS:
            raise UserError(f"qlora learns adapters of a quantized base, not of {dtype}: choose {', '.join(FORMATS)}, or training lora.")
        if self.training == "full" and dtype in FORMATS:
            raise UserError(f"weights in {dtype} cannot be learned: choose bfloat16 or float32, or training qlora.")


@dataclasses.dataclass(frozen=True)
class Training:
    """A step of training: `case` says model, mesh, dtype, rows of a micro-batch and tokens of a row (its context).

    Raises:
      UserError: a base that the recipe has no use for, or rows that the mesh does not divide.
    """

    case: Case
    recipe: Recipe

    def __post_init__(self) -> None:
        self.recipe.check(self.case.dtype)
        if self.case.batch % self.case.row_ways:
            raise UserError(
                f"the mesh {self.case.mesh_name} divides rows among {self.case.row_ways} devices, and {self.case.batch} rows of a "
                f"micro-batch are no multiple of it: others cost whole activations. Choose {self._multiple()}."
            )

    def _multiple(self) -> int:
        """The next number of rows that the mesh divides."""
        return math.ceil(self.case.batch / self.case.row_ways) * self.case.row_ways

    def with_rows(self, rows: int) -> Training:
        return dataclasses.replace(self, case=dataclasses.replace(self.case, batch=rows))

    def with_length(self, length: int) -> Training:
        return dataclasses.replace(self, case=dataclasses.replace(self.case, context=length))

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.case.batch * self.case.context * self.recipe.accumulate

    @property
    def local_tokens(self) -> int:
        """Of a micro-batch, on each device."""
        (rows,) = self.case.local(("batch",), (self.case.batch,))
        return rows * self.case.context

    @functools.cached_property
    def frozen(self) -> list[Kind]:
        return _kinds(self.case.config, self.case.dtype, self.recipe.ranks)[1]

    @functools.cached_property
    def learned(self) -> list[Kind]:
        """As they are kept between steps: adapters in float32, masters too."""
        found = _kinds(self.case.config, self.case.dtype, self.recipe.ranks)[0]
        return [kind._replace(itemsize=FLOAT32) for kind in found] if self.recipe.master else found

    @property
    def learned_count(self) -> int:
        """Parameters that are learned, every one counted once."""
        return sum(math.prod(kind.shape) * kind.number for kind in self.learned)

    @functools.cached_property
    def learned_elements(self) -> int:
        """On each device."""
        return sum(self.case.bytes_of(kind._replace(itemsize=1) for kind in self.learned).values())


@functools.lru_cache
def _kinds(config: Config, dtype: str, ranks: Ranks) -> tuple[list[Kind], list[Kind]]:
    """Learned and frozen leaves. Where all weights are learned, those of the vision tower are not: text teaches them nothing."""
    model = abstract_model(config, dtype)
    if ranks:
        add_adapters(model, dict(ranks))
    unseen = () if ranks or config.vision is None else ("vision.*", "projector*")
    learned = Split(model, frozen=unseen).learned
    leaves = nnx.to_flat_state(nnx.state(model))
    parts: tuple[list, list] = ([], [])
    for path, leaf in leaves:
        parts[parameter_name(path) not in learned].append((path, leaf))
    return kinds(parts[0]), kinds(parts[1])
