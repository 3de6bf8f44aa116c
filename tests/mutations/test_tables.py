"""The faults of `run.py` can still be made: trying them takes an hour, so nobody would notice soon that a table is of yesterday."""

import collections
from pathlib import Path

import pytest

from mutations.run import ROOT, read_tables

MUTATIONS = read_tables()
PACKAGES = {"prompt", "config", "ops", "model", "convert", "checkpoint", "inference", "sharding"}


@pytest.mark.parametrize("table", sorted({mutation.table for mutation in MUTATIONS}))
def test_faults_can_be_made(table):
    """What is to be replaced stands in its file exactly once, and is replaced by something else."""
    for mutation in MUTATIONS:
        if mutation.table == table:
            assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.before) == 1, mutation
            assert mutation.before != mutation.after, mutation


def test_the_named_tests_are_there():
    """pytest ends with an error, not with a failure, if it finds none; here that is seen at once."""
    for mutation in MUTATIONS:
        for node in mutation.tests:
            file, _, name = node.partition("::")
            assert (ROOT / file).is_file(), mutation
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8") or not name, mutation


def test_every_package_is_broken_somewhere():
    """Sixty faults in one file would say nothing of the others."""
    files = [Path(mutation.file).parts for mutation in MUTATIONS]
    broken = collections.Counter(parts[1].removesuffix(".py") if parts[0] == "maverick_jax" else parts[0] for parts in files)
    assert len(MUTATIONS) >= 60
    assert not PACKAGES - broken.keys()
