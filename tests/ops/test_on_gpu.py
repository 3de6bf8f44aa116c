"""What only a GPU can show: its kernels, its float32, its loop. `pytest -m gpu` on a machine that has one; skipped elsewhere.

Shape suffixes: B batch, T tokens.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.assets import mini_directory
from maverick_jax.check import check
from maverick_jax.config import Config
from maverick_jax.inference.generate import generate
from maverick_jax.model.quantized import inputs_together
from maverick_jax.ops import toolkit
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.quantize import FLOAT8, QuantizedArray
from maverick_jax.plan.weights import DTYPES
from maverick_jax.sharding import THROUGHPUT
from oracle.plain import PATCH, SIDE, VISION, plain_model

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4  # of logits in float32, as everywhere
# Lowering a kernel is what jax warns at; a user's process has no filter of ours before the kernels are imported.
AS_A_USER = """
import maverick_jax as mj
print(mj.generate(mj.load(), [[5, 6, 7]], max_new_tokens=2))
"""


@pytest.fixture
def on_cpu():
    """A context in which everything is computed by the processor."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["mini", "scout", "maverick"])
def test_kernels_at_the_sizes_of_a_model(model, dtype):
    """Every expert of a layer on one card, as far as memory goes: int4 of a whole layer once ended in CUDA_ERROR_ILLEGAL_ADDRESS."""
    config = Config.from_directory(mini_directory()) if model == "mini" else getattr(Config, model)()
    found = check(config, {}, THROUGHPUT, dtype, model=model)
    assert found.healthy, str(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_toolkit_at_the_sizes_of_maverick(monkeypatch, dtype):
    if jax.devices()[0].compute_capability != toolkit.HOPPER:
        pytest.skip(f"Mosaic's kernels are for Hopper, this is {jax.devices()[0].device_kind}")
    monkeypatch.setenv(toolkit.CHOICE, "mosaic")
    jax.clear_caches()
    found = check(Config.maverick(), {}, THROUGHPUT, dtype, model="maverick")
    jax.clear_caches()
    assert found.healthy, str(found)


def test_float32_is_that_of_a_cpu(on_cpu):
    """TF32 would be off by 6e-3; text over several chunks, experts and a picture."""
    ids_BT = np.random.default_rng(0).integers(4, 40, (2, 40))
    ids_BT[:, 3] = PATCH
    tiles = np.random.default_rng(1).uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32)
    logits = np.asarray(plain_model(vision=VISION)(ids_BT, tiles))
    with on_cpu:
        expected = np.asarray(plain_model(vision=VISION)(ids_BT, tiles))
    assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_the_same_tokens_as_on_a_cpu(on_cpu):
    """The engine's programs with their kernels: prefill in pieces, pages, decode across the borders of chunks."""
    prompts = [np.random.default_rng(n).integers(4, 40, n).tolist() for n in (1, 9, 30)]
    found = generate(plain_model(), prompts, max_new_tokens=20, stop_ids=())
    with on_cpu:
        assert found == generate(plain_model(), prompts, max_new_tokens=20, stop_ids=())


def test_no_warning_reaches_a_user():
    """jax's deprecation of Pallas-Triton least of all."""
    ended = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", AS_A_USER], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert "Deprecat" not in ended.stderr


def test_float8_rows(on_cpu):
    """On Hopper by its own instruction, on other cards as floats: what a processor gives."""
    random = np.random.default_rng(0)
    values = jnp.asarray(random.standard_normal((4, 512, 256), np.float32), FLOAT8)
    scales = jnp.asarray(random.uniform(0.01, 0.02, (4, 1, 256)), "bfloat16")
    x, sizes = jnp.asarray(random.standard_normal((300, 512), np.float32), "bfloat16"), jnp.asarray([7, 200, 0, 80], "int32")
    with on_cpu:
        expected = np.asarray(grouped_matmul(x, QuantizedArray(values, scales, float8_rows=True), sizes), np.float32)
    weight = QuantizedArray(inputs_together(jnp.copy(values)), scales, float8_rows=True)
    found = np.asarray(jax.jit(grouped_matmul)(x, weight, sizes), np.float32)
    assert_allclose(found, expected, atol=2**-7 * np.abs(expected).max(), rtol=0)
