"""Do a config and the tensors in the files belong together? Counts first, which cost nothing, then names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from maverick_jax.config import Config
from maverick_jax.errors import UserError

CURE = "config and weights belong to different models: fetch both from one place."
SHOWN = 3  # names
LONGEST = 120  # characters of one
NUMBER = "([0-9]{1,9})"  # longer ones are no layer's


def some_of(names: Collection[str], most: int = SHOWN) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in list(names)[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def compare_names(directory: Path | str, found: Collection[str], expected: Collection[str], *, spell: Callable[[str], str] = str) -> None:
    """Refuse a directory that lacks a tensor or has one too many.

    Args:
      spell: how the files spell a name.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    faults = [f"{what} {some_of([*map(spell, some)])}" for what, some in (("lacks", missing), ("has the unexpected", unexpected)) if some]
    if faults:
        raise UserError(f"{directory} {', and '.join(faults)}: {CURE}")


def compare_layers(
    directory: Path | str, config: Config, names: Collection[str], layers: tuple[str, str], *, spell: Callable[[str], str] = str
) -> None:
    """Refuse a config with another number of layers than the files: what it describes may be too large even to be described.

    Args:
      layers: what names of the text's and of the vision tower's layers begin with, `{i}` for the number.
      spell: how the files spell a name.
    """
    counts = (config.text.num_hidden_layers, config.vision.num_hidden_layers if config.vision else 0)
    each = [numbers(begin, names) for begin in layers]
    if not any(each):  # other names altogether: some of them help more than their number
        compare_names(directory, names, [f"{layers[0].format(i=i)}*" for i in range(min(counts[0], SHOWN))], spell=spell)
    for part, found, count in zip(("text", "vision"), each, counts, strict=True):
        if count and count != len(found):
            raise UserError(f"{directory} has {_count(found, f'{part} layer')}, the config asks for {count:,}: {CURE}")


def compare_experts(directory: Path | str, config: Config, found: set[int]) -> None:
    """Refuse a config with another number of experts than the files have, one by one."""
    if len(found) != (count := config.text.num_local_experts):
        raise UserError(f"{directory} has {_count(found, 'routed expert')}, the config asks for {count:,}: {CURE}")


def numbers(begin: str, names: Iterable[str]) -> set[int]:
    """The different numbers in the place of `{i}`."""
    pattern = re.compile(re.escape(begin).replace(r"\{i\}", NUMBER))
    return {int(match[1]) for name in names if (match := pattern.match(name))}


def _count(found: set[int], what: str) -> str:
    """How many there are, and the first that is missing among them."""
    lost = next(i for i in range(len(found) + 1) if i not in found)
    return f"{len(found):,} {what}{'s' * (len(found) != 1)}" + (f", but no {what} {lost}" if lost < len(found) else "")
