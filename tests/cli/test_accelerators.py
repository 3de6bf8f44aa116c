"""What commands say and take of accelerators: nothing where there is none, nothing where they need none."""

import os
import subprocess
import sys

import jax
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.cli import options
from maverick_jax.convert import convert

SEARCH = "from maverick_jax.cli import options; options.quiet_accelerator_search(); import jax; print(jax.default_backend())"


def run(*words: str) -> tuple[str, str]:
    """What a process of its own prints, and its standard error, where the user says nothing about platforms."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, ended.stderr


def test_silence_where_there_is_none():
    """libtpu, which comes with the test extra, is not started to find that out."""
    if options.accelerator_in_sight():
        pytest.skip("this machine has an accelerator, or a plugin for one")
    assert run("-c", SEARCH) == ("cpu\n", "")


def test_reading_a_checkpoint_takes_none(tmp_path):
    """On a machine with a TPU that another process uses, `inspect` would wait or fail."""
    convert(mini_directory(), tmp_path / "model")
    code = f"import sys; sys.argv[1:] = ['inspect', {str(tmp_path / 'model')!r}]; from maverick_jax.__main__ import main; main()"
    out, error = run("-c", code + "; import jax; print(jax.config.values['jax_platforms'])")
    assert error == ""
    assert out.endswith("\ncpu\n")


@pytest.mark.parametrize("asked", ["tpu", "cpu", "cuda,cpu", None])
@pytest.mark.parametrize("seen", [True, False])
def test_jax_is_left_to_search_where_something_may_be_found(monkeypatch, asked, seen):
    """And what the user says holds in any case."""
    monkeypatch.setattr(options, "accelerator_in_sight", lambda: seen)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    before = jax.config.values["jax_platforms"]
    try:
        jax.config.update("jax_platforms", asked)
        options.quiet_accelerator_search()
        assert jax.config.values["jax_platforms"] == ("cpu" if asked is None and not seen else asked)
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("device", ["accel0", "vfio/12", "nvidia0", "nvidiactl", "dxg", "kfd"])
def test_devices_that_are_seen(tmp_path, monkeypatch, device):
    monkeypatch.setattr(options, "DEVICES", tuple(str(tmp_path / pattern.removeprefix("/dev/")) for pattern in options.DEVICES))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    assert not options.accelerator_in_sight()
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # is there wherever the module is loaded
    assert not options.accelerator_in_sight()
    (tmp_path / device).touch()
    assert options.accelerator_in_sight()
