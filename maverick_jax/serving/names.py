"""What clients may call what answers them: the model by its names, each of its adapters by its own."""

from __future__ import annotations

from collections.abc import Sequence

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown
from maverick_jax.serving.failure import Failure


def all_names(names: Sequence[str], adapters: Sequence[str]) -> list[str]:
    """
    Args:
      names: of the model.

    Raises:
      UserError: an adapter has one of them.
    """
    if both := [name for name in adapters if name in names]:
        raise UserError(f"the adapter {shown(both[0])} has the model's name: call it, or with --name the model, otherwise.")
    return [*names, *adapters]


def check_name(name: str | None, known: Sequence[str]) -> None:
    """None is the model.

    Raises:
      Failure: nobody is called so.
    """
    if name is not None and name not in known:
        raise Failure(404, f"model is {shown(name)}: here is {', '.join(known)}.", field="model", code="model_not_found")
