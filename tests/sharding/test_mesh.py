"""The mesh: its axes, and clear words for what cannot be made."""

import pytest
from jax.sharding import AxisType

from maverick_jax.errors import UserError
from maverick_jax.sharding import make_mesh, parse_mesh


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
