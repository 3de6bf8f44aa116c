"""Expert parallelism by `lax.ragged_all_to_all`: each device sends exactly the rows that a destination gets, no padding.

For TPU, asked for by name. XLA:CPU has no such operation: there it is put together from an all-gather, so that the same
program can be tested.

Shape suffixes: L tokens of one device, N devices that divide the experts (S as senders), R rows that a device has room
for, D model width, E experts, K experts of one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax

from maverick_jax.ops.permute import sort_rows, take_rows
from maverick_jax.sharding import all_to_all
from maverick_jax.sharding.dispatch import ExpertParallel, run_experts, run_rounds


@dataclasses.dataclass(frozen=True)
class Ragged(ExpertParallel):
    """Dispatcher over the mesh axes that divide the experts. What arrives at a device is one stream, sender by sender;
    so many rows of it as there is room for fit a round.

    Attributes:
      capacity_factor: rows that a device has room for, as a multiple of its own tokens (an even share of all).
    """

    def exchange(self, x_LD, expert_L, experts, placement):
        axes = placement.expert_axes
        L, N, K = x_LD.shape[0], placement.size(axes), experts.numbers
        room = N * L if L <= all_to_all.ONE_ROUND_TOKENS else min(N * L, math.ceil(self.capacity_factor * L))
        me = lax.axis_index(axes)
        order, place_L, load = sort_rows(expert_L, N * K + 1)
        x_sorted = take_rows(x_LD, order, place_L)
        load_SNK = lax.all_gather(load, axes).reshape(N, N, K)  # the one message about the messages
        count_SN = load_SNK.sum(axis=2)
        first_SN = jnp.cumsum(count_SN, axis=1) - count_SN  # first row for a receiver among the sender's sorted rows
        before_SN = jnp.cumsum(count_SN, axis=0) - count_SN  # first row of a sender in the receiver's stream
        ends = jnp.cumsum(load_SNK[:, me].reshape(-1))  # of the runs of one sender and expert in this device's stream

        def one_round(number, routes, x_sorted, experts):
            """The rows at `number * room` and the `room - 1` behind it, of every receiver's stream."""
            first_SN, before_SN, count_SN, ends = routes
            low = number * room
            begin_SN, end_SN = (jnp.clip(edge - before_SN, 0, count_SN) for edge in (low, low + room))
            sizes_SN = end_SN - begin_SN
            at_sender_SN, at_receiver_SN = first_SN + begin_SN, before_SN + begin_SN - low
            received = _send_rows(x_sorted, room, at_sender_SN, sizes_SN, at_receiver_SN, axes)
            run_R = jnp.searchsorted(ends, low + jnp.arange(room), side="right")
            expert_R = jnp.where(run_R < N * K, run_R % K, K)
            y = run_experts(received, expert_R.astype(jnp.int32), experts)
            return _send_rows(y, L, at_receiver_SN.T, sizes_SN.T, at_sender_SN.T, axes)

        routes = first_SN, before_SN, count_SN, ends
        if room >= N * L:
            y_sorted, done = one_round(0, routes, x_sorted, experts), 1
        else:
            needed = -(-count_SN.sum(axis=0).max() // room)
            y_sorted, done = run_rounds(one_round, needed, routes, x_sorted, experts, rounds=self.rounds, mesh=self.mesh)
        return take_rows(y_sorted, place_L, order), jnp.maximum(ends[-1] - done * room, 0)


def _send_rows(x, rows, start_SN, sizes_SN, target_SN, axes):
    """Sender s gives receiver n `sizes_SN[s, n]` rows from row `start_SN[s, n]`, which lie there from row `target_SN[s, n]`.

    Returns [rows, D], zero where nothing arrived.
    """
    default, cpu = (functools.partial(form, rows=rows, axes=axes) for form in (_ragged_all_to_all, _gathered))
    return lax.platform_dependent(x, start_SN, sizes_SN, target_SN, cpu=cpu, default=default)


def _ragged_all_to_all(x, start_SN, sizes_SN, target_SN, *, rows, axes):
    me, out = lax.axis_index(axes), jnp.zeros((rows, x.shape[1]), x.dtype)
    start, sizes, target, arriving = (a.astype(jnp.int32) for a in (start_SN[me], sizes_SN[me], target_SN[me], sizes_SN[:, me]))
    return lax.ragged_all_to_all(x, out, start, sizes, target, arriving, axis_name=axes if len(axes) > 1 else axes[0])


def _gathered(x, start_SN, sizes_SN, target_SN, *, rows, axes):
    """The same from an all-gather: every device takes its rows out of all."""
    me, row_R = lax.axis_index(axes), jnp.arange(rows)
    target_S, start_S, sizes_S = target_SN[:, me], start_SN[:, me], sizes_SN[:, me]
    arrives_RS = (row_R[:, None] >= target_S[None]) & (row_R[:, None] < (target_S + sizes_S)[None])
    sender_R = arrives_RS.argmax(axis=1)
    x_SLD = lax.all_gather(x, axes)
    taken = x_SLD[sender_R, jnp.clip(start_S[sender_R] + row_R - target_S[sender_R], 0, x.shape[0] - 1)]
    return jnp.where(arrives_RS.any(axis=1)[:, None], taken, 0)
