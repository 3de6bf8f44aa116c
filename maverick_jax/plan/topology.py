"""Names of topologies: `v6e:8x8` is a slice of 64 TPU chips, `h100:8` one host of eight GPUs."""

from __future__ import annotations

import dataclasses
import math

from maverick_jax.errors import UserError
from maverick_jax.plan.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one chip."""

    chip: Chip
    shape: str

    @classmethod
    def parse(cls, name: str) -> Topology:
        """`"v6e:8x8"` -> 64 devices.

        Raises:
          UserError: names the valid forms.
        """
        kind, _, shape = name.partition(":")
        chip = CHIPS.get(kind)
        if chip is None:
            raise UserError(
                f"topology {name!r} is unknown: write CHIP:SHAPE, such as v6e:8x8 or h100:8, with CHIP one of {', '.join(CHIPS)}."
            )
        if shape not in chip.shapes:
            why = "; more GPUs need several hosts, which this plan does not model" if chip.is_gpu else ""
            raise UserError(f"topology {name!r} is unknown: {kind} comes as {', '.join(chip.shapes)}{why}.")
        return cls(chip, shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}"

    @property
    def devices(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))

    def larger(self) -> list[Topology]:
        """What to try when this one is too small: more of the same chip, then as many GPUs with more memory."""
        more = [Topology(self.chip, shape) for shape in self.chip.shapes]
        found = [topology for topology in more if topology.devices > self.devices]
        if self.chip.is_gpu:
            found += [Topology(chip, self.shape) for chip in CHIPS.values() if chip.is_gpu and chip.memory > self.chip.memory]
        return found
