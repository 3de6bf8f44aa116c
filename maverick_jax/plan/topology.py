"""Names of topologies: `v6e:8x8` is a slice of 64 TPU chips, `h100:8` a host of eight GPUs, `h100:8x2` two such hosts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown
from maverick_jax.plan.chips import CHIPS, Chip

FORMS = "write CHIP:SHAPE, such as v6e:8x8, h100:8 or h100:8x2"
MOST_HOSTS = 1024
GPUS = re.compile(r"([1-9][0-9]{0,3})(?:x([1-9][0-9]{0,3}))?")


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one chip.

    Attributes:
      shape: of TPUs the slice's chips along its axes; of GPUs how many of a host, and "x" how many hosts.
    """

    chip: Chip
    shape: str

    @classmethod
    def parse(cls, name: str) -> Topology:
        """`"v6e:8x8"` -> 64 devices.

        Raises:
          UserError: names the valid forms, and what was probably meant.
        """
        if not isinstance(name, str):
            raise UserError(f"topology {shown(name)} is no text: {FORMS}.")
        kind, _, shape = name.strip().lower().partition(":")
        chip = CHIPS.get(kind)
        if chip is None:
            close = difflib.get_close_matches(kind, CHIPS, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"topology {shown(name)} is unknown: {meant}{FORMS}, with CHIP one of {', '.join(CHIPS)}.")
        if chip.is_gpu:
            return _parse_gpus(name, chip, shape)
        if shape not in chip.shapes:
            raise UserError(f"topology {shown(name)} is unknown: {kind} comes as {', '.join(chip.shapes)}.")
        return cls(chip, shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}"

    @property
    def devices(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x")) * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Groups of devices that only the network joins; a TPU slice is one, however many machines it has."""
        return int(self.shape.partition("x")[2] or 1) if self.chip.is_gpu else 1

    def larger(self) -> list[Topology]:
        """What to try when this one is too small: a larger slice; more GPUs of the host, GPUs with more memory, more hosts."""
        if not self.chip.is_gpu:
            more = [Topology(self.chip, shape) for shape in self.chip.shapes]
            return [topology for topology in more if topology.devices > self.devices]
        of_host = self.devices // self.hosts
        others = sorted(
            (chip for chip in CHIPS.values() if chip.host >= of_host and chip.memory > self.chip.memory), key=lambda c: c.memory
        )
        doubled = [of_host * 2**i for i in range(1, 8) if of_host * 2**i < self.chip.host]
        return [
            *(_gpus(self.chip, number, self.hosts) for number in [*doubled, self.chip.host] if number > of_host),
            *(_gpus(chip, of_host, self.hosts) for chip in others),
            *(_gpus(self.chip, self.chip.host, self.hosts * 2**i) for i in range(1, 5) if self.hosts * 2**i <= MOST_HOSTS),
        ]


def _gpus(chip: Chip, of_host: int, hosts: int) -> Topology:
    return Topology(chip, str(of_host) if hosts == 1 else f"{of_host}x{hosts}")


def _parse_gpus(name: str, chip: Chip, shape: str) -> Topology:
    found = GPUS.fullmatch(shape)
    of_host, hosts = (int(number or 1) for number in found.groups()) if found else (0, 0)
    if 1 <= of_host <= chip.host and 1 <= hosts <= MOST_HOSTS:
        return _gpus(chip, of_host, hosts)
    many, rest = divmod(of_host, chip.host)
    cure = (
        f"{chip.name}:{chip.host}x{many}"
        if hosts == 1 and not rest and many > 1
        else f"{chip.name}:{chip.host} or {chip.name}:{chip.host}x2"
    )
    raise UserError(
        f"topology {shown(name)} is unknown: {chip.name} comes as 1 to {chip.host} of one {chip.group}, and as up to {MOST_HOSTS:,} such "
        f"{chip.group}s: write {cure}."
    )
