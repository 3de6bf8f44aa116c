"""Layouts: logical axes become mesh axes, and a mesh that does not divide the model is refused by name."""

import dataclasses

import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import maverick_jax as mj
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.model import get_abstract_model
from maverick_jax.sharding import LATENCY, THROUGHPUT, TRAINING, Layout, get_layout, make_mesh
from maverick_jax.sharding.layout import LOGICAL_AXES, WEIGHTS


def config(**text) -> Config:
    maverick = Config.maverick()
    return dataclasses.replace(maverick, text=dataclasses.replace(maverick.text, **text))


def test_experts_and_their_width_are_divided():
    """Whole experts over `expert`, their width over `tensor`: two mesh axes on one tensor."""
    mesh = make_mesh(expert=4, tensor=2)
    assert THROUGHPUT.spec(("expert", "expert_embed", "expert_mlp"), (128, 5120, 8192), mesh) == PartitionSpec("expert", None, "tensor")


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
    axes, shape, mesh = ("expert", "expert_embed", "expert_mlp"), (128, 5120, 8192), make_mesh(data=2, expert=2, tensor=2)
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


@pytest.mark.parametrize(
    "layout, vocab, embed",
    [(THROUGHPUT, "tensor", None), (LATENCY, ("expert", "tensor"), None), (TRAINING, None, ("data", "expert"))],
    ids=lambda value: getattr(value, "name", ""),
)
def test_embedding_and_unembedding_are_divided(layout, vocab, embed):
    """Undivided, the two largest matrices outside the experts lie whole on every device: 4 GB of Maverick."""
    mesh, text = make_mesh(data=2, expert=2, tensor=2), Config.maverick().text
    sizes = (text.vocab_size, text.hidden_size)
    assert layout.spec(("vocab", "table_embed"), sizes, mesh) == PartitionSpec(vocab, embed)
    assert layout.spec(("table_embed", "vocab"), sizes[::-1], mesh) == PartitionSpec(embed, vocab)


EXPECTED_ROWS = {
    "throughput": {
        "heads": "tensor",
        "kv_heads": "tensor",
        "vision_heads": "tensor",
        "vision_mlp": "tensor",
        "tiles": "data expert",
        "attention_batch": "data expert",
        "attention_sequence": "data expert",
        "batch": "data expert",
        "sequence": "data expert",
        "tokens": "data expert",
        "expert": "expert",
        "expert_mlp": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
    },
    "latency": {
        "heads": "tensor",
        "kv_heads": "tensor",
        "vision_heads": "tensor",
        "vision_mlp": "tensor",
        "tiles": "data expert",
        "attention_batch": "data expert",
        "attention_sequence": "data expert",
        "batch": "data",
        "tokens": "data",
        "sequence": "data",
        "expert_mlp": "expert tensor",
        "mlp": "expert tensor",
        "vocab": "expert tensor",
    },
}
OVER_ALL = {"embed": "data expert", "table_embed": "data expert", "vision_embed": "data expert", "expert_embed": "data"}
EXPECTED_ROWS["training"] = {axis: to for axis, to in EXPECTED_ROWS["throughput"].items() if axis != "vocab"} | OVER_ALL


@pytest.mark.parametrize("name", EXPECTED_ROWS)
def test_named_layouts_divide_all_that_they_should(name):
    """A row that is lost changes no result: whatever it divided lies whole on every device, and only memory and time tell."""
    layout = get_layout(name)
    assert {axis: " ".join(layout.mesh_axes(axis)) for axis in LOGICAL_AXES if layout.mesh_axes(axis)} == EXPECTED_ROWS[name]


@pytest.mark.parametrize("release", [Config.maverick(), Config.scout()], ids=["maverick", "scout"])
def test_the_table_of_weights_is_that_of_the_model(release):
    """A weight whose axes the table does not know could lose its sharding to a misspelt row again."""
    parameters = nnx.to_flat_state(nnx.state(get_abstract_model(release)))
    weights = {frozenset(filter(None, leaf.get_metadata()["axes"])) for _, leaf in parameters}
    assert {axes for axes in weights if len(axes) > 1} == set(map(frozenset, WEIGHTS))
    assert frozenset().union(*weights) <= set(LOGICAL_AXES)


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


@pytest.mark.parametrize(
    "table, message",
    [
        ({"expret": "expert"}, "layout 'custom' has a row 'expret', which is no logical axis: did you mean 'expert'?"),
        ({"Vocab": "tensor"}, "layout 'custom' has a row 'Vocab', which is no logical axis: did you mean 'vocab'?"),
        ({"experts": "expert"}, "layout 'custom' has a row 'experts', which is no logical axis: did you mean 'expert'?"),
        ({"q": "tensor"}, f"layout 'custom' has a row 'q', which is no logical axis: there are {', '.join(LOGICAL_AXES)}."),
        ({7: "tensor"}, f"layout 'custom' has a row 7, which is no logical axis: there are {', '.join(LOGICAL_AXES)}."),
        ({"tokens": ("data", "expert", "data")}, "layout 'custom' puts 'tokens' on mesh axis 'data' twice: once divides it."),
        (
            {"expert": "expert", "expert_mlp": ["tensor", "expert"]},
            "layout 'custom' puts 'expert' and 'expert_mlp' on mesh axis 'expert', but they are axes of one weight, of which it "
            "divides one: give them mesh axes of their own.",
        ),
        (
            {"embed": "tensor", "heads": "tensor"},
            "layout 'custom' puts 'embed' and 'heads' on mesh axis 'tensor', but they are axes of one weight, of which it "
            "divides one: give them mesh axes of their own.",
        ),
        *(
            ({"vocab": to}, f"layout 'custom' puts 'vocab' on {shown}: give the name of a mesh axis, or several in a tuple.")
            for to, shown in ((None, "None"), (4, "4"), (("tensor", 4), "('tensor', 4)"), ([None], "(None,)"), ({"tensor"}, "{'tensor'}"))
        ),
    ],
    ids=str,
)
def test_tables_that_mean_nothing_are_refused(table, message):
    """A misspelt row divides nothing: every expert would lie whole on every device, without a word."""
    with pytest.raises(UserError) as error:
        mj.load(layout=table)
    assert str(error.value) == message


@pytest.mark.parametrize("layout", [7, ["expert"], b"throughput"], ids=repr)
def test_what_is_neither_name_nor_table(layout):
    """One line, not a traceback from inside."""
    with pytest.raises(UserError, match="is neither a name nor a table: choose one of throughput, latency, training, or pass a dict"):
        get_layout(layout)


def test_two_rows_of_one_axis():
    """Of a layout made by hand: the second would win without a word."""
    with pytest.raises(UserError, match="layout 'twice' has two rows 'vocab': keep one"):
        Layout("twice", (("vocab", ("tensor",)), ("vocab", ())))


def test_rows_can_be_lists_or_empty():
    """As a table read from JSON has them; an empty row says what no row says."""
    layout = get_layout({"tokens": ["data", "expert"], "vocab": ()})
    assert (layout.mesh_axes("tokens"), layout.mesh_axes("vocab")) == (("data", "expert"), ())
