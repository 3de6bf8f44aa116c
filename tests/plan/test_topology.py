"""Names of topologies: what they hold, what is larger, and a line for each name that is none."""

import math

import pytest

from maverick_jax.errors import UserError
from maverick_jax.plan.chips import CHIPS, GIB
from maverick_jax.plan.topology import Topology


@pytest.mark.parametrize(
    "name, devices, hosts",
    [
        ("v6e:8x8", 64, 1),
        ("v5p:4x4x4", 64, 1),
        ("v4:2x2x4", 16, 1),
        ("v7x:2x2x1", 8, 1),  # four chips of two devices each
        ("h100:1", 1, 1),
        ("h100:3", 3, 1),
        ("h100:8", 8, 1),
        ("h100:8x2", 16, 2),
        ("h200:4x3", 12, 3),
        ("gb200:72", 72, 1),
        ("gb200:64x2", 128, 2),
        ("a100-40gb:8", 8, 1),
    ],
)
def test_devices_and_hosts(name, devices, hosts):
    found = Topology.parse(name)
    assert (found.devices, found.hosts, found.name) == (devices, hosts, name)


def test_spellings():
    """Capitals are no mistake, and one host is one host."""
    assert Topology.parse("H100:8x1") == Topology.parse("h100:8")
    assert Topology.parse(" V6E:8x8").name == "v6e:8x8"


@pytest.mark.parametrize(
    "name, words",
    [
        ("h10:8", "did you mean h100"),
        ("tpu-v6e:8x8", "did you mean v6e"),
        ("v6:8x8", "CHIP one of v4, v5e"),
        ("v6e", "v6e comes as 1x1, 2x2"),
        ("v6e:0x8", "v6e comes as 1x1, 2x2"),
        ("v6e:64", "v6e comes as"),
        ("h100", "write h100:8 or h100:8x2"),
        ("h100:", "write h100:8 or h100:8x2"),
        ("h100:8x", "write h100:8 or h100:8x2"),
        ("h100:x2", "write h100:8 or h100:8x2"),
        ("h100:0", "1 to 8 of one host"),
        ("h100:9", "1 to 8 of one host"),
        ("h100:-8", "1 to 8 of one host"),
        ("h100:16", "write h100:8x2"),
        ("h100:64", "write h100:8x8"),
        ("h100:8x0", "up to 1,024 such hosts"),
        ("h100:8x2x2", "up to 1,024 such hosts"),
        ("h100:8x" + "9" * 5000, "up to 1,024 such hosts"),
        ("h100:٨", "1 to 8 of one host"),
        ("gb200:73", "1 to 72 of one rack"),
        ("", "write CHIP:SHAPE"),
        (":8", "write CHIP:SHAPE"),
        (8, "topology 8 is no text"),
        (None, "topology None is no text"),
    ],
    ids=lambda value: str(value)[:24] or "empty",
)
def test_mistakes(name, words):
    with pytest.raises(UserError) as error:
        Topology.parse(name)
    assert words in str(error.value)
    assert len(str(error.value)) < 400


def test_larger():
    """More of the host, other GPUs in the same number, more hosts: the network comes last. Nothing smaller, nothing unheard of."""
    names = [topology.name for topology in Topology.parse("h100:4").larger()]
    assert names[:6] == ["h100:8", "h20:4", "h200:4", "b200:4", "gb200:4", "mi300x:4"]
    assert names[6:8] == ["h100:8x2", "h100:8x4"]
    assert [topology.name for topology in Topology.parse("v5e:8x8").larger()] == ["v5e:8x16", "v5e:16x16"]
    for start in ("h100:3", "gb200:72", "gb200:5x3", "mi300x:8x1024", "a100-40gb:1"):
        for topology in Topology.parse(start).larger():
            assert Topology.parse(topology.name) == topology


def test_chips():
    """Every slice has as many sides as its kind, slices grow, and no figure is off by a power of ten."""
    for chip in CHIPS.values():
        assert chip.is_gpu != bool(chip.shapes), chip.name
        sizes = [math.prod(map(int, shape.split("x"))) for shape in chip.shapes]
        assert sizes == sorted(set(sizes)), chip.name
        assert len({shape.count("x") for shape in chip.shapes}) <= 1, chip.name
        assert 16 * GIB <= chip.memory <= 192 * GIB
        assert 800e9 <= chip.bandwidth <= 8000e9
        assert 1 <= chip.fp8_flops / chip.flops <= 2.1
        assert 140e12 <= chip.flops <= 2500e12
        assert chip.network < chip.link < chip.bandwidth
