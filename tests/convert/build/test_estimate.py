"""`--dry-run`: what would be done, and nothing is."""

import json
import shutil

import pytest

from maverick_jax.convert import convert
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.errors import UserError


@pytest.mark.parametrize("target", [None, "float32", "int4"])
def test_an_estimate_is_what_is_then_done(maverick, tmp_path, target):
    found = estimate(maverick.source, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []
    done = convert(maverick.source, tmp_path / "out", target=target, progress=False)
    assert (found.kind, found.tensors, found.parameters) == (done.kind, done.tensors, done.parameters)
    assert (found.bytes_read, found.bytes_written) == (done.bytes_read, done.bytes_written)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert found.bytes_written == manifest["bytes"]
    assert found.parameters == manifest["parameters"] == sum(tensor.size for tensor in maverick.tensors.values())


def test_too_little_room_is_said(maverick, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "TOO LITTLE" in estimate(maverick.source, tmp_path / "out").as_text()


def test_a_destination_that_exists_is_refused_at_once(maverick, tmp_path):
    with pytest.raises(UserError, match="exists: choose another destination"):
        estimate(maverick.source, tmp_path)
