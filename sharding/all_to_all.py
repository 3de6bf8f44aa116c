"""Expert parallelism by all-to-all: tokens travel to the device of their expert and back, inside `shard_map`.

Every device sorts its tokens by expert, which also sorts them by destination, and sends each destination up to
`capacity` of them; what does not fit goes in a further round, so that inference never drops a token. The fixed shapes
run on CPU, GPU and TPU. Two data all-to-alls and one for the expert numbers per round.

Shape suffixes: T all tokens, L tokens of one device, N devices of the expert axis, C capacity, D model width, E experts.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.sharding.dispatch import Stats, run_experts
from maverick_jax.sharding.layout import Layout

AXIS = "expert"
ONE_ROUND_TOKENS = 64  # up to here a device's tokens all fit one destination's buffer: no loop, as in decode


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Dispatcher over the mesh's `expert` axis.

    Attributes:
      mesh, layout: where tokens and experts lie.
      capacity_factor: rows per destination, as a multiple of an even share of a device's tokens.
      rounds: None sends until no token is left (inference; reverse mode cannot pass its `while_loop`); a number sends so
        often and reports what was dropped (training).
    """

    mesh: Mesh
    layout: Layout
    capacity_factor: float = 2.0
    rounds: int | None = None

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]:
        token_axes = self.layout.mesh_axes("tokens")
        width_axes = self.layout.mesh_axes("expert_mlp")
        T, E = x_TD.shape[0], experts.gate_EDF.shape[0]
        missing = -T % math.prod(self.mesh.shape[a] for a in token_axes)
        x_TD = jnp.pad(x_TD, ((0, missing), (0, 0)))
        expert_T = jnp.pad(expert_T, (0, missing), constant_values=E)
        tokens, weights = (
            PartitionSpec(token_axes),
            ExpertWeights(
                PartitionSpec(AXIS, None, width_axes), PartitionSpec(AXIS, None, width_axes), PartitionSpec(AXIS, width_axes, None)
            ),
        )
        local = jax.shard_map(
            lambda x, e, w: self._on_device(x, e, w, E, token_axes, width_axes),
            mesh=self.mesh,
            in_specs=(tokens, tokens, weights),
            out_specs=(tokens, Stats(PartitionSpec(), PartitionSpec())),
            check_vma=False,  # the CPU grouped matmul's loops carry zeros that vary over no axis
        )
        y_TD, stats = local(x_TD, expert_T, experts)
        return y_TD[:T], stats

    def _on_device(self, x_LD, expert_L, experts, E, token_axes, width_axes):
        N, L = self.mesh.shape[AXIS], x_LD.shape[0]
        capacity = self._capacity(L, N)
        order = jnp.argsort(expert_L)
        sorted_expert = expert_L[order]
        destination = sorted_expert // (E // N)  # N for padding
        count_N = jnp.bincount(destination, length=N).astype(jnp.int32)
        first_N = jnp.cumsum(count_N) - count_N
        rank = jnp.arange(L) - first_N[jnp.minimum(destination, N - 1)]
        x_sorted = x_LD[order]

        def one_round(number, y_sorted):
            """Send and receive the tokens whose rank among those for their destination lies in this round's window."""
            window = number * capacity + jnp.arange(capacity)
            row_NC = jnp.minimum(first_N[:, None] + window[None, :], L - 1)
            used_NC = window[None, :] < count_N[:, None]
            send = jnp.where(used_NC[..., None], x_sorted[row_NC], 0)
            send_expert = jnp.where(used_NC, sorted_expert[row_NC] % (E // N), E // N)
            received, received_expert = _exchange(send), _exchange(send_expert)
            y, _ = run_experts(received.reshape(N * capacity, -1), received_expert.reshape(-1), experts)
            back_NCD = _exchange(y.reshape(N, capacity, -1))
            here = (rank >= number * capacity) & (rank < (number + 1) * capacity) & (destination < N)
            mine = back_NCD[jnp.minimum(destination, N - 1), jnp.clip(rank - number * capacity, 0, capacity - 1)]
            return jnp.where(here[:, None], mine, y_sorted)

        y_sorted, done = self._all_rounds(one_round, jnp.zeros_like(x_sorted), count_N, capacity, L)
        y_LD = y_sorted[jnp.argsort(order)]
        if width_axes:
            y_LD = lax.psum(y_LD, width_axes)  # each device of the tensor axis computed a part of F
        dropped = jnp.maximum(count_N - done * capacity, 0).sum()
        load_E = jnp.bincount(expert_L, length=E).astype(jnp.int32)
        return y_LD, Stats(lax.psum(dropped, token_axes), lax.psum(load_E, token_axes))

    def _capacity(self, L: int, N: int) -> int:
        if L <= ONE_ROUND_TOKENS:
            return L
        return min(L, math.ceil(self.capacity_factor * L / N))

    def _all_rounds(self, one_round, y, count_N, capacity, L):
        """Results and the number of rounds. As many as needed, the same number on every device, or `self.rounds`."""
        if capacity >= L:
            return one_round(0, y), jnp.int32(1)
        if self.rounds is not None:
            for number in range(self.rounds):
                y = one_round(number, y)
            return y, jnp.int32(self.rounds)
        needed = lax.pmax(-(-count_N.max() // capacity), tuple(self.mesh.axis_names))

        def body(state):
            number, y = state
            return number + 1, one_round(number, y)

        number, y = lax.while_loop(lambda state: state[0] < needed, body, (jnp.int32(0), y))
        return y, number


def _exchange(x):
    """Axis 0 names the destination before and the source after."""
    return lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)
