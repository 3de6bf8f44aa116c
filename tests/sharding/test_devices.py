"""Devices that jax cannot start, and devices that hold too little: one line each, before anything is read."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import maverick_jax as mj
from maverick_jax.cli.main import main
from maverick_jax.errors import UserError
from maverick_jax.sharding import devices

LOADED = (
    "from maverick_jax.errors import UserError\nimport maverick_jax as mj\ntry:\n    mj.{}\nexcept UserError as error:\n    print(error)"
)


@pytest.mark.parametrize("call", ["load()", "make_mesh(expert=2)"])
def test_a_platform_without_its_plug_in(call):
    """jax asserts, and says nothing."""
    ended = subprocess.run(
        [sys.executable, "-c", LOADED.format(call)], capture_output=True, text=True, env={"JAX_PLATFORMS": "rocm"}, timeout=120
    )
    assert ended.stdout.startswith("JAX_PLATFORMS=rocm: jax cannot start it ("), ended.stderr
    assert ended.stdout.endswith("Unset it, and `maverick check` says what this machine lacks.\n")
    assert len(ended.stdout.splitlines()) == 1


@pytest.fixture
def small(monkeypatch):
    """A machine whose devices have 100 kB each."""
    monkeypatch.setattr(devices, "free_bytes", lambda here: 100_000)


def test_weights_that_do_not_fit(small, tmp_path, capsys):
    """Told before a byte of them is read, by how much, and what to do; from the command line too."""
    with pytest.raises(UserError, match=r"its weights take 0\.0 GiB of each device, and 0\.0 are free \(cpu\)\. Divide them by a mesh"):
        mj.load()
    assert main(["generate", "hi"]) == 2
    assert "what fits" in capsys.readouterr().err


def test_what_a_device_holds_is_its_part():
    """A mesh divides the weights: Scout on eight devices needs an eighth of each."""
    mesh = mj.make_mesh(expert=8)
    whole = SingleDeviceSharding(jax.devices()[0])
    divided = jax.NamedSharding(mesh, jax.P("expert"))
    most = devices.free_bytes(jax.devices())
    devices.check_room([jax.ShapeDtypeStruct((8, most // 8), jnp.int8, sharding=divided)] * 7, "a model")
    with pytest.raises(UserError, match="a model: its weights take"):
        devices.check_room([jax.ShapeDtypeStruct((8, most // 8), jnp.int8, sharding=whole)] * 7, "a model")


def test_free_memory_is_that_of_the_fullest(monkeypatch):
    cards = [types.SimpleNamespace(memory_stats=lambda used=used: {"bytes_limit": 100, "bytes_in_use": used}) for used in (10, 30, 20)]
    assert devices.free_bytes(cards) == 70  # type: ignore - as much of a device as is asked for


def test_memory_that_runs_out_later(monkeypatch, capsys):
    """What XLA says of it, and a cure; with --debug the traceback."""

    def run(args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nmore lines")

    monkeypatch.setattr("maverick_jax.cli.generate.run", run)
    assert main(["generate", "hi"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("maverick: the devices have no memory left (RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    assert said.count("\n") == 1
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["generate", "hi", "--debug"])
