"""The mesh: its axes, and clear words for what cannot be made."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from maverick_jax.errors import UserError
from maverick_jax.sharding import make_mesh, mesh, multihost, parse_mesh


def test_axes_are_named_and_automatic():
    """jax's default of explicit axes breaks shard_map on inputs without a sharding."""
    mesh = make_mesh(data=2, expert=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_may_use_some_of_the_devices():
    """Two of eight devices are no error."""
    assert make_mesh(expert=2).size == 2


def test_more_devices_than_there_are():
    """The message names both numbers and the setting that simulates more."""
    with pytest.raises(UserError, match=r"data=1, expert=16, tensor=1 needs 16 devices, there are 8; set XLA_FLAGS=\S+=16"):
        make_mesh(expert=16)


def test_more_devices_than_can_be_simulated():
    """A thousand end in an abort of the process, deep inside XLA: the flag is not suggested."""
    with pytest.raises(UserError, match=r"needs 1000 devices, there are 8; a CPU simulates at most 128\.$"):
        make_mesh(data=1000)


@pytest.mark.parametrize("size", [0, -1])
def test_every_axis_needs_a_device(size):
    """A product of zero devices would make an empty mesh."""
    with pytest.raises(UserError, match=f"mesh axis tensor is {size}"):
        make_mesh(tensor=size)


def test_parse_mesh():
    """The command line's `--mesh`, spaces allowed, in any order."""
    assert parse_mesh("data=1,expert=8,tensor=1") == {"data": 1, "expert": 8, "tensor": 1}
    assert parse_mesh("tensor=2, data=2") == {"tensor": 2, "data": 2}


@pytest.mark.parametrize(
    "text", ["", "8", "expert", "expert=", "expert=0", "expert=-2", "experts=8", "expert=8,expert=8", "data=2;tensor=2"]
)
def test_bad_mesh_texts(text):
    """A mistyped axis must not fall back to one device."""
    with pytest.raises(UserError, match="AXIS=SIZE"):
        parse_mesh(text)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a machine that is not here."""

    slice_index: int
    process_index: int
    id: int
    platform: str = "gpu"
    device_kind: str = "gpu"


@pytest.mark.parametrize(
    "sizes, slices, inside, across",
    [
        ((2, 8, 1), 2, (1, 8, 1), (2, 1, 1)),
        ((4, 4, 2), 2, (2, 4, 2), (2, 1, 1)),
        ((1, 16, 8), 16, (1, 1, 8), (1, 16, 1)),
        ((2, 8, 2), 4, (1, 4, 2), (2, 2, 1)),
        ((1, 1, 16), 2, (1, 1, 8), (1, 1, 2)),
    ],
)
def test_what_goes_across_slices(sizes, slices, inside, across):
    """`data` first, then `expert`: an all-to-all of every layer through the slow network would decide the speed."""
    assert mesh.divide_axes(sizes, slices) == (inside, across)


def test_experts_stay_inside_a_slice():
    """Four slices of eight devices on two hosts each, given in any order: every row of `data` is one slice."""
    devices = [Device(slice_index=i // 8, process_index=i // 4, id=i) for i in range(32)]
    inside, across = mesh.divide_axes((4, 4, 2), 4)
    found = mesh_utils.create_hybrid_device_mesh(inside, across, devices[::-1])
    assert np.vectorize(lambda device: device.slice_index)(found).reshape(4, 8).tolist() == [[i] * 8 for i in range(4)]


def test_a_mesh_that_the_slices_cannot_share():
    """Three rows of data over two slices: the message says which axis to change."""
    devices = [Device(slice_index=i // 3, process_index=0, id=i) for i in range(6)]
    with pytest.raises(UserError, match=r"data=3, expert=1 cannot be laid over 2 slices: make data, or else expert, a multiple of 2"):
        mesh.arrange(devices, (3, 1, 1), "data=3, expert=1")


def test_every_process_gives_as_many_devices(monkeypatch):
    """The first four devices would all be process 0's, and process 1 would have nothing to compute."""
    monkeypatch.setattr(jax, "devices", lambda: [Device(slice_index=0, process_index=i // 4, id=i) for i in range(8)])
    assert [device.id for device in mesh._share(4)] == [0, 1, 4, 5]


def test_a_mesh_that_the_processes_cannot_share(monkeypatch):
    """Three devices on two processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="has 3 devices, which 2 processes cannot share evenly"):
        make_mesh(expert=3)


@pytest.mark.parametrize("processes, each", [(1, 12), (2, 6), (5, 3)])
def test_processes_simulate_their_part_of_the_devices(monkeypatch, processes, each):
    """Twelve in each of two processes would be twice as many as the mesh has."""
    asked = {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(multihost, "process_count", lambda: processes)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    mesh.request_cpu_devices(12)
    assert asked == {"jax_num_cpu_devices": each}
