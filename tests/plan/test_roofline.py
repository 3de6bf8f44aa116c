"""The roofline against calculations by hand."""

import itertools

import pytest

from maverick_jax.errors import UserError
from maverick_jax.plan import make_plan, search
from maverick_jax.plan.case import Ways
from maverick_jax.plan.roofline import all_gather, all_reduce, all_to_all, decode, distinct_experts, prefill, step, token_bytes
from maverick_jax.sharding.layout import LATENCY, Layout

# Experts undivided by number, every width over all devices.
WIDE = Layout.from_table(
    "wide",
    {
        "batch": "data",
        "tokens": "data",
        "expert_mlp": ("expert", "tensor"),
        "mlp": ("expert", "tensor"),
        "vocab": ("expert", "tensor"),
        "heads": "tensor",
        "kv_heads": "tensor",
    },
)


@pytest.mark.parametrize("experts, tokens", [(2, 3), (3, 3), (4, 2)])
def test_distinct_experts_by_counting(experts, tokens):
    """The expectation over all ways in which tokens can choose, each as likely as any other."""
    choices = list(itertools.product(range(experts), repeat=tokens))
    assert distinct_experts(experts, tokens) == pytest.approx(sum(len(set(choice)) for choice in choices) / len(choices))


@pytest.mark.parametrize("batch, hit", [(1, 1.0), (64, 50.5), (1024, 128.0)])
def test_distinct_experts_of_maverick(batch, hit):
    assert distinct_experts(128, batch) == pytest.approx(hit, abs=0.05)


def test_collectives():
    """Eight devices of a host, 80 bytes: seven eighths go round once to gather, twice to sum; alone nobody sends."""
    assert all_gather(Ways(8, 1), 80) == all_to_all(Ways(8, 1), 80) == (70, 0)
    assert all_reduce(Ways(8, 1), 80) == (140, 0)
    assert all_gather(Ways(1, 1), 80) == all_reduce(Ways(1, 1), 80) == all_to_all(Ways(1, 1), 80) == (0, 0)


def test_collectives_between_hosts():
    """Two hosts of four devices, 80 bytes. A sum crosses in shares of a quarter, half of each there and half back; of what goes to all
    eight devices half crosses, and of the other half a quarter stays."""
    assert all_reduce(Ways(4, 2), 80) == (2 * 60, 2 * 10)
    assert all_gather(Ways(4, 2), 80) == (60, 10)
    assert all_to_all(Ways(4, 2), 80) == (30, 40)
    assert all_to_all(Ways(1, 2), 80) == (0, 40)


def test_dispatch(case):
    """10,240 B per token and MoE layer each way: 5,120 bfloat16 numbers. 8 tokens per device, 7 of 8 leave it, 24 layers."""
    found = case("v6e:8x8", expert=8, tensor=8)
    assert token_bytes(found) == 10_240
    sent = decode(found).sent
    assert sent["all-to-all to experts"] == sent["all-to-all from experts"] == 24 * 8 * 10_240 * 7 / 8


def test_all_reduces(case):
    """Over the 8 devices of `tensor`, 8 rows: once for the embedding, 48 attentions, 24 dense, 24 shared and 24 routed. Over those of
    `expert`, of which each looks at a part of every page, sums of all 64 rows, 5 heads of 128 numbers in float32."""
    cost = decode(case("v6e:8x8", expert=8, tensor=8))
    once = 2 * 7 / 8 * 8 * 10_240
    sums = {name: size for name, size in cost.sent.items() if "all-reduce" in name}
    parts = 48 * 2 * 7 / 8 * 64 * 5 * 128 * 4
    assert list(sums.values()) == [once, 48 * once, 24 * once, 24 * once, 24 * once, parts]
    assert cost.collectives == 1 + 48 + 24 + 24 + 24 + 24 + 24 + 48


def test_launches(case):
    """As many as the text for eight H200s has: 7, 24 dense layers with 15 and 24 mixtures with 26. Where no token travels one sum of the
    shared and the routed expert goes round, with those of 48 attentions, of 24 dense layers and of the embedding."""
    cost = decode(case("h200:8", tensor=8, layout=LATENCY, batch=1))
    assert cost.launches == 991
    assert cost.collectives == 1 + 48 + 24 + 24
    assert decode(case("h200:8", expert=8)).launches == 7 + 24 * 15 + 24 * 57
    assert decode(case("v6e:8x8", expert=8, tensor=8)).launches == 0


def test_bytes_of_a_decode_step(case):
    """Everything but the embedding table and the vision tower once, the experts as far as 64 tokens hit them, and the cache."""
    cost = decode(case("v6e:8x8", expert=8, tensor=8))
    weights = 2 * (3_019_898_880 + 6_039_797_760 + 3_019_898_880 + 1_034_485_760) / 8 + 2 * (15_728_640 + 496_640)
    experts = 2 * 386_547_056_640 / 64 * (1 - (127 / 128) ** 64)
    cache = 8 * 48 * 8192 * 512
    rows = 8 * 10_240
    assert sum(cost.read.values()) == pytest.approx(weights + experts + cache + rows)
    assert cost.seconds["memory"] == pytest.approx((weights + experts + cache + rows) / 1600e9)
    assert cost.binds == "memory"


def test_products_of_a_decode_step(case):
    """Twice the active parameters without the embedding table (16,150,205,440; spec 1.4) and attention, for one token on one device."""
    cost = decode(case("h100:1", batch=1, context=8192))
    norms = 496_640  # parameters, but no products
    attention = 48 * 4 * 40 * 128 * 8192
    assert sum(cost.products.values()) == 2 * (16_150_205_440 - norms) + attention


def test_decode_beyond_the_chunk(case):
    """A RoPE layer reads one chunk, the others the whole context."""
    found = decode(case("h100:1", batch=1, context=100_000))
    assert found.read["cache"] == (36 * 8192 + 12 * 100_000) * 4096
    assert found.products["scores"] == 4 * 40 * 128 * (36 * 8192 + 12 * 100_000)


def test_prefill_pieces_see_what_came_before(case):
    """Two pieces of 1,024 tokens have the pairs of 2,048 tokens: 2048 * 2049 / 2 per layer; a new chunk starts from nothing."""
    found = case("h100:1", batch=1)
    pairs = sum(step(found, 1, 1024, start).products["scores"] for start in (0, 1024))
    assert pairs == 48 * 4 * 40 * 128 * 2048 * 2049 / 2
    later = step(found, 1, 1024, 8192).products["scores"]
    assert later == 4 * 40 * 128 * (48 * 1024 * 1025 / 2 + 12 * 1024 * 8192)


def test_prefill_adds_up(case):
    """8 prompts at a time on 8 shares of the batch: 64 take eight times as long as 8."""
    found = prefill(case("v6e:8x8", expert=8, tensor=8))
    assert (found.rows, found.piece) == (8, 1024)
    assert found.batch_seconds == pytest.approx(8 * found.seconds)
    assert found.tokens_per_second == pytest.approx(8 * 8192 / found.seconds)


def test_long_pieces_share_the_weights(case):
    """1,024 tokens per device take less time to send and compute than the weights to read; of 65,536 the all-reduces take longest."""
    found = case("v6e:8x8", expert=8, tensor=8)
    assert step(found, 8, 1024, 0).binds == "memory"
    assert step(found, 64, 8192, 0).binds == "links"


def test_one_token_reads_one_expert(case):
    """On 8 devices an expected eighth each, but one of them reads a whole expert and all wait for it."""
    cost = decode(case("v6e:8x8", expert=8, tensor=8, batch=1))
    assert cost.read["routed experts"] == 24 * 3 * 5120 * 8192 * 2 / 8


def test_groups_of_data_have_their_own_tokens(case):
    """With data=2 each half of the batch chooses among its own copies of the experts."""
    cost = decode(case("v6e:8x8", data=2, expert=4, tensor=8, batch=64))
    assert cost.read["routed experts"] == pytest.approx(2 * 386_547_056_640 / 32 * (1 - (127 / 128) ** 32))


def test_a_layout_without_expert_parallelism(case):
    """Widths over (expert, tensor): no all-to-all, one all-reduce of both experts over 64 devices, and every token on every device."""
    found = case("v6e:8x8", expert=8, tensor=8, batch=4, layout=WIDE)
    cost = decode(found)
    assert not [name for name in cost.sent if "all-to-all" in name]
    assert cost.sent["shared expert all-reduce"] == 24 * 2 * 63 / 64 * 4 * 10_240  # with the routed one's part
    assert "routed expert all-reduce" not in cost.sent
    assert cost.read["routed experts"] == pytest.approx(2 * 386_547_056_640 / 64 * (1 - (127 / 128) ** 4))
    assert cost.products["routed experts"] == 2 * 24 * 4 * 3 * 5120 * 8192 / 64


def test_fp8_experts_are_multiplied_at_the_fp8_rate(case):
    """Long pieces on eight H100s: the routed experts' part takes half as long, nothing else changes."""
    slow, fast = (step(case("h200:8", tensor=8, dtype=dtype), 8, 1024, 0) for dtype in ("bfloat16", "fp8"))
    routed = slow.products["routed experts"]
    assert slow.products == fast.products
    assert slow.seconds["compute"] - fast.seconds["compute"] == pytest.approx(routed / 989e12 - routed / 1979e12)


def test_more_rows_share_the_weights(maverick_config):
    """In total speed only grows with the batch, for a user it only falls, once the rows divide."""
    curve = [(batch, cost.step) for batch, cost in make_plan(maverick_config, topology="v6e:8x8").curve if batch >= 8]
    steps, rates = [step for _, step in curve], [batch / step for batch, step in curve]
    assert steps == sorted(steps)
    assert rates == sorted(rates)


def test_two_hosts(case):
    """`expert` lies between the hosts, `tensor` inside: tokens cross, and sums over parts of pages. 8 of 16 tokens cross, 10,240 B each
    way; of sums, those of 32 rows and 5 heads of 128 numbers."""
    cost = decode(case("h100:8x2", expert=2, tensor=8, batch=32))
    parts = 48 * 32 * 5 * 128 * 4
    tokens = dict.fromkeys(("all-to-all to experts", "all-to-all from experts"), 24 * 16 * 10240 / 2)
    assert cost.crossed == {**tokens, "attention parts all-reduce": parts}
    assert not [name for name in cost.sent if "all-to-all" in name]
    assert cost.seconds["network"] == pytest.approx((24 * 16 * 10_240 + parts) / 50e9)
    inside = decode(case("h100:8", tensor=8, batch=16)).sent  # where no token travels one sum serves the shared and the routed expert
    assert cost.sent == {**inside, "routed expert all-reduce": inside["shared expert all-reduce"]}


def test_a_network_that_binds(case):
    """A long prompt over two hosts: the tokens that change host take longer than everything that happens inside."""
    cost = step(case("h100:8x2", expert=2, tensor=8), 2, 4096, 0)
    assert cost.binds == "network"
    assert cost.step == cost.seconds["network"] == sum(cost.crossed.values()) / 50e9


def test_one_host_and_slices_have_no_network(case):
    """Nothing of the network in a plan that has none."""
    assert "network" not in decode(case("h100:8", tensor=8)).seconds
    assert "network" not in decode(case("v6e:8x8", expert=8, tensor=8)).seconds


def test_rows_that_attention_gathers(maverick_config):
    """A layout may divide rows for everything but attention: then each device gets the rows of all."""
    plan = make_plan(maverick_config, topology="h200:8", mesh={"data": 2, "tensor": 4}, layout={"batch": "data", "mlp": "tensor"}, batch=4)
    assert plan.decode.sent["attention all-gather"] == 48 * 4 * 10_240 / 2


def test_search_puts_the_fastest_first(maverick_config):
    plans = search(maverick_config, topology="v6e:8x8", layout="throughput")
    assert all(plan.fits for plan in plans)
    assert [plan.decode.step for plan in plans] == sorted(plan.decode.step for plan in plans)
    assert plans[0].case == make_plan(maverick_config, topology="v6e:8x8", layout="throughput").case


def test_a_layout_on_an_axis_that_is_not_there(maverick_config):
    with pytest.raises(UserError, match=r"puts 'batch' on mesh axis 'rows'"):
        make_plan(maverick_config, topology="v6e:8x8", layout={"batch": "rows"})
    with pytest.raises(UserError, match=r"mesh axis 'rows' is unknown"):
        make_plan(maverick_config, topology="v6e:8x8", mesh={"rows": 64})
