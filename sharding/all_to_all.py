"""Expert parallelism by all-to-all: tokens travel to the device of their expert and back, inside `shard_map`.

Every device sorts its tokens by expert, which also sorts them by destination, and sends each destination up to
`capacity` of them, whichever of its experts they want; what does not fit goes in a further round, so that inference never
drops a token. The fixed shapes run on CPU, GPU and TPU. Two data all-to-alls and one for the expert numbers per round.

Shape suffixes: T all tokens, L tokens of one device, N devices that divide the experts, C capacity, D model width,
E experts, K experts of one device.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from maverick_jax.errors import UserError
from maverick_jax.ops.permute import count_rows, sort_rows, take_rows
from maverick_jax.sharding.dispatch import ExpertParallel, run_experts, run_rounds
from maverick_jax.sharding.wire import WIRES, all_to_all, exchange

ONE_ROUND_TOKENS = 64  # up to here a device's tokens all fit one destination's buffer: no loop, as in decode


@dataclasses.dataclass(frozen=True)
class AllToAll(ExpertParallel):
    """Dispatcher over the mesh axes that divide the experts.

    Attributes:
      capacity_factor: rows per destination, as a multiple of an even share of a device's tokens.
      wire: dtype that travels: None for the activations' own, "bfloat16" or "float8_e4m3fn" (with a scale per row).
    """

    wire: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wire not in WIRES:
            raise UserError(f"wire={self.wire!r} of a dispatcher: choose one of {', '.join(map(repr, WIRES))}.")

    def exchange(self, x_LD, expert_L, experts, placement):
        axes = placement.expert_axes
        L, N, K = x_LD.shape[0], placement.size(axes), experts.numbers
        capacity = self._capacity(L, N)
        order, place_L, _ = sort_rows(expert_L, N * K + 1)
        destination_L = expert_L // K  # N for padding
        count_N = count_rows(destination_L, N)
        first_N = jnp.cumsum(count_N) - count_N
        rank_L = place_L - first_N[jnp.minimum(destination_L, N - 1)]

        def one_round(number, routes, x_LD, experts):
            """Send and receive the tokens whose rank among those for their destination lies in this round's window."""
            order, first_N, count_N, expert_L, destination_L, rank_L = routes
            rank_C = number * capacity + jnp.arange(capacity, dtype=jnp.int32)
            used_NC = rank_C[None, :] < count_N[:, None]
            token_NC = jnp.where(used_NC, order[jnp.minimum(first_N[:, None] + rank_C[None, :], L - 1)], L)
            in_window_L = (destination_L < N) & (rank_L >= rank_C[0]) & (rank_L <= rank_C[-1])
            slot_L = jnp.where(in_window_L, destination_L * capacity + rank_L - rank_C[0], N * capacity)
            token_R = token_NC.reshape(-1)
            send_RD = take_rows(x_LD, token_R, slot_L)
            send_expert_R = (expert_L % K).at[token_R].get(mode="fill", fill_value=K)
            received = exchange(send_RD.reshape(N, capacity, -1), axes, self.wire)
            received_expert = all_to_all(send_expert_R.reshape(N, capacity), axes)
            y = run_experts(received.reshape(N * capacity, -1), received_expert.reshape(-1), experts)
            back = exchange(y.reshape(N, capacity, -1), axes, self.wire)
            return take_rows(back.reshape(N * capacity, -1), slot_L, token_R)

        routes = order, first_N, count_N, expert_L, destination_L, rank_L
        if capacity >= L:
            y_LD, done = one_round(0, routes, x_LD, experts), 1
        else:
            y_LD, done = run_rounds(one_round, -(-count_N.max() // capacity), routes, x_LD, experts, rounds=self.rounds, mesh=self.mesh)
        return y_LD, jnp.maximum(count_N - done * capacity, 0).sum()

    def _capacity(self, L: int, N: int) -> int:
        if L <= ONE_ROUND_TOKENS:
            return L
        return min(L, math.ceil(self.capacity_factor * L / N))
