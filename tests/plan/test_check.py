"""`maverick check`: it says so where a machine computes or exchanges something wrong, and what is missing."""

import json
import re

import jax
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.bench import machine
from maverick_jax.check import check, installed, kernels, links, report
from maverick_jax.cli.main import main
from maverick_jax.config import Config
from maverick_jax.ops.linear import linear
from maverick_jax.sharding import THROUGHPUT

KERNELS = ["dense product", "experts, gate", "experts, down", "a prompt", "over the cache", "a piece behind", "a tile"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "READ_BYTES", 2**12)
    monkeypatch.setattr(machine, "REPEATS", 1)
    monkeypatch.setitem(machine.WIDTH, "cpu", 8)


@pytest.fixture(scope="module")
def mini() -> Config:
    return Config.from_directory(mini_directory())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8", "int4"])
def test_all_is_well_here(mini, dtype):
    """A device's share of every kernel, by the same reference whatever is stored."""
    found = check(mini, {"expert": 4, "tensor": 2}, THROUGHPUT, dtype, model="mini")
    assert [kernel.name for kernel in found.kernels] == KERNELS
    assert [link.name for link in found.links] == ["all-to-all", "all-reduce"]
    assert found.healthy, str(found)
    assert all(kernel.seconds > 0 and kernel.flops > 0 and 0 < kernel.error <= kernel.allowed for kernel in found.kernels)
    stored = dtype if dtype in ("float32", "bfloat16", "int8", "int4") else "float8_e4m3fn"
    assert f"64 rows by [32, 64, 16] {stored}" in str(found)
    assert str(found).endswith("all is well")


def test_a_kernel_that_is_off_is_named(mini, monkeypatch):
    """By two in a hundred, which no model's answer would show at once."""
    monkeypatch.setattr(kernels, "linear", lambda x, w: 1.02 * linear(x, w))
    found = check(mini, {}, THROUGHPUT, "bfloat16")
    assert not found.healthy
    assert [kernel.name for kernel in found.kernels if not kernel.right] == ["dense product"]
    assert "wrong: dense product. Please report" in str(found)
    assert not found.as_dict()["healthy"]


def test_a_kernel_that_fails_leaves_the_others(mini, monkeypatch):
    """The error is what is to be found out; numbers that are none are not written into JSON."""

    def fails(*_):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS\nand much more")

    monkeypatch.setattr(kernels, "grouped_matmul", fails)
    found = check(mini, {}, THROUGHPUT, "bfloat16")
    assert [kernel.trouble for kernel in found.kernels if not kernel.right] == ["CUDA_ERROR_ILLEGAL_ADDRESS"] * 2
    assert "BAD  experts, gate" in str(found)
    assert [kernel["error"] for kernel in json.loads(json.dumps(found.as_dict(), allow_nan=False))["kernels"][1:3]] == [None, None]


def test_what_arrives_elsewhere_is_noticed(mini, monkeypatch):
    """A wire that gives back what it was given looks like one if only sums are compared."""
    monkeypatch.setattr(links, "all_to_all", lambda x, axes: x)
    found = check(mini, {"expert": 8}, THROUGHPUT, "bfloat16")
    assert [link.right for link in found.links] == [False, True]
    assert "wrong: all-to-all" in str(found)


def test_as_many_experts_as_there_is_memory_for(mini, monkeypatch):
    monkeypatch.setitem(report.STACK_BYTES, "cpu", 10 * 64 * 32 * 2)
    assert check(mini, {}, THROUGHPUT, "bfloat16").kernels[1].shapes == "64 rows by [10, 64, 32] bfloat16"


@pytest.mark.parametrize(
    "there, platforms, says",
    [
        ((), "cpu", "JAX_PLATFORMS=cpu keeps jax from it: unset it"),
        ((), None, r"no plug-in for it: pip install 'maverick-jax\[cuda13\]'"),
        (("jax-cuda13-plugin",), None, r"jax cannot use it \(.*cuda.*\): see that its driver is new enough"),
    ],
    ids=["kept away", "no plug-in", "an old driver"],
)
def test_a_gpu_that_jax_does_not_use(monkeypatch, there, platforms, says):
    monkeypatch.setattr(installed.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    monkeypatch.setattr(installed, "_version", lambda package: "1.0" if package in there else None)
    monkeypatch.setattr(installed, "_kept_to", lambda: platforms)
    (note, extras) = installed.notes(jax.devices())
    assert re.search(f"this machine has an NVIDIA GPU.*{says}", note), note
    assert "torch reads .pth checkpoints" in extras


class Card:
    platform = "gpu"

    def __init__(self, kind: str, capability: str):
        self.device_kind, self.compute_capability = kind, capability


@pytest.mark.parametrize(
    "kind, capability, says",
    [("Tesla V100", "7.0", ["no bfloat16", "FP8 weights"]), ("NVIDIA A100", "8.0", ["FP8 weights"]), ("NVIDIA H100", "9.0", [])],
)
def test_older_cards(kind, capability, says):
    """And where there is no cuDNN, as here, that is said."""
    about = [note for note in installed.notes([Card(kind, capability)]) if kind in note or "cuDNN" in note]
    for note, words in zip(about, [*says, "cuDNN cannot be used"], strict=True):
        assert words in note


def test_the_command(capsys):
    """As a program reads it; the status tells a script."""
    assert main(["check", "-m", str(mini_directory()), "--mesh", "expert=8", "--dtype", "fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"]
    assert found["devices"] == "8 x cpu"
    assert "maverick-jax" in found["versions"]
    assert [kernel["name"] for kernel in found["kernels"]] == KERNELS


def test_a_command_that_finds_a_fault(capsys, monkeypatch):
    monkeypatch.setattr(links, "all_to_all", lambda x, axes: x)
    monkeypatch.setattr(report, "cases", lambda *_: {})
    assert main(["check", "-m", str(mini_directory()), "--mesh", "expert=2"]) == 1
    assert "BAD  all-to-all" in capsys.readouterr().out
