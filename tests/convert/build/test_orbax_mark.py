"""Orbax takes our checkpoints for what they are: it warns of nothing, however they are opened."""

import logging
import warnings

import pytest
from orbax.checkpoint import v1 as ocp

from maverick_jax.checkpoint import load, save
from maverick_jax.convert import convert


@pytest.fixture
def params(request, maverick, tmp_path):
    if request.param == "saved":
        return save(load(maverick.converted), tmp_path / "model") / "params"
    convert(maverick.source, tmp_path / "model", target=request.param)
    return tmp_path / "model/params"


@pytest.mark.parametrize("params", [None, "int4", "saved"], indirect=True)
def test_nothing_is_logged_and_nothing_warned(params, caplog):
    """It looks for an array of Zarr 2 or OCDBT's manifest, and knew ours by neither."""
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Sharding info not provided")  # of arrays that jax had, whichever checkpoint holds them
        leaves = ocp.metadata(params).metadata
        found = ocp.load(params)
    assert [record.getMessage() for record in caplog.records] == []
    assert found.keys() == leaves.keys() == {"text", "vision", "projector"}


def test_version_0_reads_the_tree_inside(maverick, caplog):
    """As people did, and do: the folder that holds the arrays."""
    import orbax.checkpoint as version_0

    with caplog.at_level(logging.WARNING):
        for checkpointer in (version_0.PyTreeCheckpointer(), version_0.StandardCheckpointer()):
            found = checkpointer.restore(maverick.converted / "params/state")
            assert found.keys() == {"text", "vision", "projector"}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
