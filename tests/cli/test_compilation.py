"""Compiled programs are kept for the next command; nothing about keeping them ends one."""

import argparse
import os
import time
import warnings

import jax
import jax.numpy as jnp
import pytest

from maverick_jax.cli import compilation


def compile_one() -> list[str]:
    """A program that is new to this process; how jax came by it."""
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))

    @jax.jit
    def kept_program(x):
        return jnp.sin(x) * 3 + 1

    assert kept_program(jnp.float32(0)) == 1
    return [event for event in events if event in ("cache_hits", "compile_requests_use_cache")]


def entries(folder) -> list:
    return sorted(folder.glob("*/jit_kept_program-*-cache"))


def test_a_second_command_reads_what_the_first_compiled(tmp_path):
    before = dict(jax.config.values)
    with compilation.kept(str(tmp_path)):
        assert "cache_hits" not in compile_one()
    assert len(entries(tmp_path)) == 1
    with compilation.kept(str(tmp_path)):
        assert "cache_hits" in compile_one()
    assert jax.config.values == before


@pytest.mark.parametrize("data", [b"", b"not a program", None], ids=["empty", "another", "truncated"])
def test_a_damaged_entry_is_compiled_again_and_mended(tmp_path, capfd, data):
    """jax would warn of it at every start for ever: it never writes over an entry."""
    with compilation.kept(str(tmp_path)):
        compile_one()
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-100] if data is None else data)
    with compilation.kept(str(tmp_path)):
        assert "cache_hits" not in compile_one()
    with compilation.kept(str(tmp_path)):
        assert "cache_hits" in compile_one()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("asked", ["", "none"])
def test_off(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with compilation.kept(asked):
        compile_one()
        assert "cache_hits" not in compile_one()
    assert list(tmp_path.iterdir()) == []


def test_where_programs_are_kept(tmp_path, monkeypatch):
    """The option goes before jax's own setting, and that before the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = tmp_path / "maverick-jax"
    assert compilation._folder(None, "theirs") == "theirs"
    assert compilation._folder(None, None) == str(home / compilation._this_kind_of_machine())
    assert compilation._folder(str(tmp_path / "asked"), "theirs") == str(tmp_path / "asked" / compilation._this_kind_of_machine())
    assert home.stat().st_mode & 0o022 == 0  # whoever can write there can have his code run
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    assert compilation._folder(None, None) is None


def test_a_folder_that_cannot_be_is_a_note(tmp_path, capfd):
    (tmp_path / "file").touch()
    with compilation.kept(str(tmp_path / "file" / "cache")):
        compile_one()
    error = capfd.readouterr().err
    assert error.startswith("maverick: note: compiled programs are not kept")
    assert "not a directory" in error
    assert error.count("\n") == 1


def test_a_full_disk_is_one_note(tmp_path, capfd, monkeypatch):
    """However many programs there are; and other warnings are shown as before."""
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *more: shown.append(str(message)))
    with compilation.kept(str(tmp_path)):
        for name in ("jit_one", "jit_two"):
            reason = f"Error writing persistent compilation cache entry for '{name}': OSError: [Errno 28] No space left on device"
            warnings.warn(reason, stacklevel=1)
        warnings.filterwarnings("always")
        warnings.warn("something else", stacklevel=1)
    assert capfd.readouterr().err.count("No space left on device") == 1
    assert shown == ["something else"]


def test_the_oldest_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "MOST_BYTES", 25)
    for age, name in enumerate("newest middle oldest".split()):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (time.time() - 100 * age,) * 2)
    compilation._forget_oldest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "newest"]


def test_the_help_names_the_folder():
    parser = argparse.ArgumentParser()
    compilation.add_argument(parser)
    assert "maverick-jax in $XDG_CACHE_HOME or ~/.cache" in " ".join(parser.format_help().split())
