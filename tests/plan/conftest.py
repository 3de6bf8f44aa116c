"""The two presets, and cases on eight by eight v6e chips and on one device."""

import pytest

from maverick_jax.config import Config
from maverick_jax.plan.case import Case
from maverick_jax.plan.topology import Topology
from maverick_jax.sharding.layout import THROUGHPUT


@pytest.fixture(scope="session")
def maverick_config() -> Config:
    return Config.maverick()


@pytest.fixture(scope="session")
def case(maverick_config):
    """`case("v6e:8x8", expert=8, tensor=8, batch=64)`: Maverick, throughput, bfloat16, context 8,192 unless said otherwise."""

    def make(topology, *, data=1, expert=1, tensor=1, batch=64, context=8192, dtype="bfloat16", layout=THROUGHPUT) -> Case:
        return Case(maverick_config, Topology.parse(topology), (data, expert, tensor), layout, dtype, batch, context)

    return make
