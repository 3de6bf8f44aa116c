"""Dispatchers move tokens to their experts and bring the results back. `Local`: every device computes what its own experts
owe to the tokens it is given, one device being the simplest case.

Shape suffixes: T tokens, L tokens of one device, R rows, D model width, F expert width, E experts, K experts of one device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from maverick_jax.config.checks import POSITIVE, is_whole
from maverick_jax.errors import UserError
from maverick_jax.ops.permute import count_rows, sort_rows, take_rows
from maverick_jax.ops.swiglu import ExpertWeights, grouped_swiglu
from maverick_jax.sharding.layout import Layout, check_placed
from maverick_jax.sharding.placement import Placement


class Stats(NamedTuple):
    """What a dispatch did: tokens that found no room (always 0 at inference) and tokens per expert; the router adds what it thought."""

    dropped: jax.Array  # [] int32
    load_E: jax.Array  # [E] int32
    expert_T: jax.Array | None = None  # [T] int32, E for padding
    scores_TE: jax.Array | None = None  # [T, E] float32, before the sigmoid


OneRound = Callable[[int | jax.Array, Any, jax.Array, ExpertWeights], jax.Array]


class Dispatcher(Protocol):
    """`dispatcher(x_TD, expert_T, experts) -> (y_TD, stats)`: each token through its expert's SwiGLU.

    `expert_T` is int32; the value E (one past the last expert) marks padding, whose result is zero and which travels
    nowhere. Where tokens have adapters of their own it counts in `experts.numbers` instead, several to each expert. All
    dispatchers give the dense sum over experts, forward and gradient; in x's dtype, or, where it has been summed over devices,
    in float32.
    """

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]: ...


@dataclasses.dataclass(frozen=True)
class Local:
    """No token travels to an expert: each device applies the experts it holds to all tokens of its data group.

    On one device (no mesh) that is all there is to do: sort by expert, one grouped matmul, sort back. On a mesh the tokens
    are gathered over the axes that divide experts, and the results are summed over them and over the axes that divide the
    experts' width. The `latency` layout, which divides only the width, needs nothing else.
    """

    mesh: Mesh | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if (self.mesh, self.layout) != (None, None):
            check_placed(self.mesh, self.layout)

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]:
        if self.mesh is None or self.layout is None:
            y_TD = run_experts(x_TD, expert_T, experts)
            return y_TD, Stats(jnp.zeros((), jnp.int32), _load(expert_T, experts))
        placement = Placement.of(self.mesh, self.layout, experts)

        def on_device(x_LD, expert_L, experts):
            K = experts.numbers
            if placement.expert_axes:
                own_L = expert_L - lax.axis_index(placement.expert_axes) * K
                expert_L = jnp.where((own_L >= 0) & (own_L < K), own_L, K)
            y_LD = run_experts(x_LD, expert_L, experts)
            return placement.sum(y_LD.astype(jnp.float32), placement.expert_axes + placement.width_axes), jnp.zeros((), jnp.int32)

        y_TD, dropped = placement.run(on_device, x_TD, expert_T, experts, token_axes=placement.gathered_token_axes)
        return y_TD, Stats(dropped, _load(expert_T, experts))


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """Tokens travel over the mesh axes that divide the experts: what `AllToAll` and `Ragged` have in common.

    Attributes:
      mesh, layout: where tokens and experts lie.
      capacity_factor: rows that there is room for, as a multiple of an even share.
      rounds: None sends until no token is left (inference; reverse mode cannot pass its `while_loop`); a number sends at
        most so often and reports what was dropped (training).
    """

    mesh: Mesh
    layout: Layout
    capacity_factor: float = 2.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_placed(self.mesh, self.layout)
        if self.rounds is not None and (not is_whole(self.rounds) or self.rounds < 1):
            raise UserError(
                f"rounds={self.rounds!r} of a dispatcher: give a whole number from 1, or None for as many as there are tokens for."
            )
        if not POSITIVE.holds(self.capacity_factor):
            raise UserError(f"capacity_factor={self.capacity_factor!r} of a dispatcher: give a number above 0, such as 2.")

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]:
        placement = Placement.of(self.mesh, self.layout, experts)

        def on_device(x_LD, expert_L, experts):
            if placement.size(placement.expert_axes) == 1:
                y_LD, dropped = run_experts(x_LD, expert_L, experts), jnp.zeros((), jnp.int32)
            else:
                y_LD, dropped = self.exchange(x_LD, expert_L, experts, placement)
            # Each device of the width axes computed a part of F: summed here, where rows are fewest.
            return placement.sum(y_LD, placement.width_axes), dropped

        y_TD, dropped = placement.run(on_device, x_TD, expert_T, experts, token_axes=placement.split_token_axes)
        return y_TD, Stats(dropped, _load(expert_T, experts))

    def exchange(self, x_LD: jax.Array, expert_L: jax.Array, experts: ExpertWeights, placement: Placement) -> tuple[jax.Array, jax.Array]:
        """On one device: its tokens to their experts and back, and how many this device counts as dropped."""
        raise NotImplementedError


def _load(expert_T, experts):
    return count_rows(experts.expert_of(expert_T), experts.shape[0])


def run_experts(x_RD: jax.Array, expert_R: jax.Array, experts: ExpertWeights) -> jax.Array:
    """Rows in any order through their experts, on one device.

    Args:
      expert_R: int32 in 0..K, or in 0..`experts.numbers`; the last marks rows without an expert.

    Returns:
      [R, D] results in the rows' order, zero without an expert.
    """
    K = experts.shape[0]
    order, inverse, sizes = sort_rows(experts.expert_of(expert_R), K + 1)  # rows without an expert sort behind the last one
    y_sorted = grouped_swiglu(take_rows(x_RD, order, inverse), experts.of_rows(expert_R, order), sizes)
    return take_rows(y_sorted, inverse, order)


def run_rounds(
    one_round: OneRound, needed: jax.Array, routes: Any, x_LD: jax.Array, experts: ExpertWeights, *, rounds: int | None, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """The sum of what the rounds bring back, each token's result coming in one of them, and how many there were.

    Args:
      one_round: `(number, routes, x_LD, experts)` -> [L, D], zero for tokens of other rounds. Of these it takes every array.
      needed: rounds that this device's tokens need.
      routes: whole numbers.
      rounds: at most so many (training: reverse mode cannot pass a `while_loop`), or None for as many as any device needs.
    """
    # The same number on every device of the mesh, or the collectives of some would wait for ever.
    needed = lax.pmax(needed, tuple(mesh.axis_names))
    if rounds is not None:
        y_LD = one_round(0, routes, x_LD, experts)
        for number in range(1, rounds):
            y_LD += cast(jax.Array, _later_round(functools.partial(one_round, number), number < needed, routes, x_LD, experts))
        return y_LD, jnp.int32(rounds)
    number, y = lax.while_loop(
        lambda state: state[0] < needed,
        lambda state: (state[0] + 1, state[1] + one_round(state[0], routes, x_LD, experts)),
        (jnp.int32(0), jnp.zeros_like(x_LD)),
    )
    return _forward_only(y), number


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later_round(one_round, wanted, routes, x_LD, experts):
    """A round if it is `wanted`, else zeros. The gradient makes the round again: a conditional would copy the weights for it."""
    return lax.cond(wanted, one_round, lambda routes, x_LD, experts: jnp.zeros_like(x_LD), routes, x_LD, experts)


def _later_round_forward(one_round, wanted, *operands):
    return _later_round(one_round, wanted, *operands), (wanted, *operands)


def _later_round_backward(one_round, residuals, dy_LD):
    wanted, routes, x_LD, experts = residuals

    def gradients(x_LD, experts, dy_LD):
        found = jax.vjp(functools.partial(one_round, routes), x_LD, experts)[1](dy_LD)
        return jax.tree.map(lambda of, gradient: gradient if jnp.issubdtype(of.dtype, jnp.inexact) else None, (x_LD, experts), found)

    def nothing(x_LD, experts, _):
        return jax.tree.map(lambda of: jnp.zeros_like(of) if jnp.issubdtype(of.dtype, jnp.inexact) else None, (x_LD, experts))

    return None, None, *lax.cond(wanted, gradients, nothing, x_LD, experts, dy_LD)


_later_round.defvjp(_later_round_forward, _later_round_backward)


@jax.custom_vjp
def _forward_only(y: jax.Array) -> jax.Array:
    """`y`; the gradient is refused before jax does so, with a message of a `while_loop` that the user has never seen."""
    return y


def _refuse_gradient(_: None, dy: jax.Array) -> NoReturn:
    raise UserError(
        "no gradient passes a dispatcher that sends rounds until no token is left, as the default does: load the model with "
        "dispatcher=AllToAll(mesh, layout, rounds=2), or as many rounds as you can afford; it reports what it drops."
    )


_forward_only.defvjp(lambda y: (y, None), _refuse_gradient)
