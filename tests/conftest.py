"""Eight simulated devices, strict JAX, and the tiny models that most tests compare with transformers."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiles, the others read, in all processes of this run
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="maverick-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from typing import TYPE_CHECKING

import hypothesis
import jax
import pytest

from processes import start as start

if TYPE_CHECKING:
    from oracle.pair import Pair

NEEDS_TORCH = "compares with PyTorch, which is not installed: pip install '.[test,torch]'"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


LONGEST = (  # files that take minutes: begun first, so that at the end no process waits for another's
    "test_dispatch.py test_parity_cache.py test_snippets.py test_generate.py test_parity_sharded.py test_multihost.py test_compare.py "
    "test_quantized_matmul.py test_quantized_experts.py test_compiled.py test_commands.py test_attention.py test_notebooks.py test_kill.py "
    "test_followers.py test_engine.py test_answers_in_form.py test_same_answer.py test_not_finite.py test_engine_on_a_mesh.py "
    "test_answers.py test_batch_serve.py test_trainers.py test_form.py test_routed_experts.py test_served_names.py test_pipeline.py"
).split()


def pytest_configure(config):
    """`pytest -m gpu` is for a GPU; everything else is for simulated devices, also where there is one."""
    if config.getoption("markexpr") == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A module that imports PyTorch is skipped, and says so, where there is none."""
    report = yield
    if report.failed and "No module named 'torch'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {NEEDS_TORCH}")
    return report


def _on_gpu() -> bool:
    try:
        return jax.default_backend() == "gpu"
    except RuntimeError:  # there is no plug-in, or it finds no card
        return False


def _skip_without_torch():
    """So is a test that imports it later, or whose fixture does."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            pytest.skip(NEEDS_TORCH)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not _on_gpu():
        pytest.skip("needs a GPU: pytest -m gpu")
    return (yield from _skip_without_torch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skip_without_torch())


@pytest.fixture(scope="session", autouse=True)
def nothing_at_home(tmp_path_factory):
    """Commands keep compiled programs for the next one; what the tests compile is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps; Linux allows a process 65,530. Where all tests kept theirs, the compiler ended the
    run with a segmentation fault after some 850 of them; now they fall to about 1,200 after each module."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Material that lies beside the checkout (`../shared`) or in $MAVERICK_SHARED; tests that need it skip without it."""
    directory = Path(os.environ.get("MAVERICK_SHARED", Path(__file__).parents[2] / "shared"))
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there: set MAVERICK_SHARED to the folder of references")
    return directory


def _pair(variant: str) -> "Pair":
    from oracle.pair import make_pair

    return make_pair(variant)


@pytest.fixture(scope="session")
def tiny_maverick() -> "Pair":
    """Dense and MoE layers in turn, no QK norm, plain RoPE: transformers' float32 model and ours with its weights."""
    return _pair("maverick")


@pytest.fixture(scope="session")
def tiny_scout() -> "Pair":
    """MoE on every layer, QK norm, scaled RoPE: transformers' float32 model and ours with its weights."""
    return _pair("scout")


@pytest.fixture(params=["tiny_maverick", "tiny_scout"])
def tiny(request) -> "Pair":
    """Each of the two tiny models in turn."""
    return request.getfixturevalue(request.param)
