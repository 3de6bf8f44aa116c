"""Layouts: logical axes become mesh axes, and a mesh that does not divide the model is refused by name."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.sharding import LATENCY, THROUGHPUT, TRAINING, Layout, get_layout, make_mesh


def config(**text) -> Config:
    maverick = Config.maverick()
    return dataclasses.replace(maverick, text=dataclasses.replace(maverick.text, **text))


def test_experts_and_their_width_are_divided():
    """Whole experts over `expert`, their width over `tensor`: two mesh axes on one tensor."""
    mesh = make_mesh(expert=4, tensor=2)
    assert THROUGHPUT.spec(("expert", "embed", "expert_mlp"), (128, 5120, 8192), mesh) == PartitionSpec("expert", None, "tensor")


def test_tokens_lie_over_two_mesh_axes():
    """Tokens are divided over data and expert together, or each expert device would compute all tokens of its row."""
    mesh = make_mesh(data=2, expert=4)
    assert THROUGHPUT.spec(("tokens", None), (64, 5120), mesh) == PartitionSpec(("data", "expert"), None)


def test_what_the_mesh_does_not_divide_stays_whole():
    """A batch of three on eight devices is no error."""
    assert THROUGHPUT.sharding(("batch", None), (3, 7), make_mesh(expert=8)).is_fully_replicated


def test_a_mesh_axis_divides_one_axis_of_an_array():
    """What a batch leaves free divides the cache's sequence; a batch that takes all leaves nothing."""
    axes, mesh = ("attention_batch", "kv_heads", "attention_sequence"), make_mesh(data=2, expert=2, tensor=2)
    assert THROUGHPUT.spec(axes, (4, 8, 64), mesh) == PartitionSpec(("data", "expert"), "tensor", None)
    assert THROUGHPUT.spec(axes, (2, 8, 64), mesh) == PartitionSpec("data", "tensor", "expert")
    assert THROUGHPUT.spec(axes, (1, 8, 64), mesh) == PartitionSpec(None, "tensor", ("data", "expert"))


def test_layouts_differ_in_what_expert_divides():
    """Whole experts or a part of each; parameters of the training layout over data too."""
    axes, shape, mesh = ("expert", "embed", "expert_mlp"), (128, 5120, 8192), make_mesh(data=2, expert=2, tensor=2)
    assert THROUGHPUT.spec(axes, shape, mesh) == PartitionSpec("expert", None, "tensor")
    assert LATENCY.spec(axes, shape, mesh) == PartitionSpec(None, None, ("expert", "tensor"))
    assert TRAINING.spec(axes, shape, mesh) == PartitionSpec("expert", "data", "tensor")


def test_a_table_can_be_any_mapping_of_axes():
    """A combination of one's own: experts over two mesh axes."""
    wide = get_layout({"expert": ("data", "expert")})
    assert wide.spec(("expert", None), (128, 3), make_mesh(data=2, expert=4)) == PartitionSpec(("data", "expert"), None)


@pytest.mark.parametrize(
    "sizes, text, message",
    [
        (dict(expert=8), dict(num_local_experts=12), r"expert = 8 does not divide the 12 experts: choose one of \[1, 2, 3, 4, 6, 12\]"),
        (dict(tensor=8), dict(num_attention_heads=10, num_key_value_heads=2), "tensor = 8 does not divide the 10 attention heads"),
        (dict(tensor=4), dict(num_attention_heads=8, num_key_value_heads=2), r"tensor = 4 does not divide the 2 key/value heads"),
        (dict(tensor=8), dict(intermediate_size=100), "tensor = 8 does not divide the 100 columns of an expert"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(sizes, text, message):
    """Otherwise a shape error from deep inside shard_map says the same in a thousand lines."""
    with pytest.raises(UserError, match=message):
        THROUGHPUT.check(config(**text), make_mesh(**sizes))


def test_meshes_that_divide_are_accepted():
    """The releases run on eight devices in every shape, and a dense model needs no divisible experts."""
    for sizes in (dict(expert=8), dict(data=8), dict(tensor=8), dict(data=2, expert=2, tensor=2)):
        THROUGHPUT.check(Config.maverick(), make_mesh(**sizes))
    THROUGHPUT.check(config(num_local_experts=3, moe_layers=()), make_mesh(expert=8))


def test_a_layout_is_a_name_a_table_or_the_default():
    """Users bring their own tables as plain dicts."""
    assert get_layout(None) is get_layout("throughput") is THROUGHPUT
    table = get_layout({"expert": "expert", "tokens": ("data", "expert")})
    assert isinstance(table, Layout)
    assert table.mesh_axes("tokens") == ("data", "expert")
    assert table.mesh_axes("heads") == ()


def test_bad_layouts_are_refused():
    """An unknown name, or a mesh axis that the mesh has not."""
    with pytest.raises(UserError, match="layout 'fastest' is unknown: choose one of throughput, latency, training"):
        get_layout("fastest")
    with pytest.raises(UserError, match="puts 'mlp' on mesh axis 'model'"):
        get_layout({"mlp": "model"}).check(Config.maverick(), make_mesh())
