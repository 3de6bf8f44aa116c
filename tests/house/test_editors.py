"""What an editor sees of an editable install, outside the checkout: packages, overloads, misspelt names."""

import json
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import jax
import maverick_jax as mj
from maverick_jax.convert import open_source
from maverick_jax.sharding import AllToAll

model = mj.load("MODEL", mesh=mj.make_mesh(expert=8), layout=mj.sharding.LATENCY)
logits: jax.Array = model([[1, 2]], lengths=[2])
logits, cache = model([[1, 2]], cache=mj.KVCache.create(model.config.text, 1, 8, "float32"))
print(cache.max_length, mj.convert_checkpoint("SRC", "OUT").seconds, mj.convert.open_source)
mj.lod("MODEL")
model([[1, 2]], tile=None)
AllToAll(open_source, mj.sharding.LATENCY)
"""
WRONG = {
    10: '"lod" is not a known attribute of module "maverick_jax"',
    11: "No overloads",
    12: '"FunctionType" is not assignable to "Mesh"',
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment with an editable install of this checkout; its other packages are those of this one."""
    pytest.importorskip("setuptools", minversion="77")
    checkout, environment = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("environment")
    for name in ("pyproject.toml", "README.md", "LICENSE", "maverick_jax", "sharding", "convert"):
        (checkout / name).symlink_to(ROOT / name)
    build = "from setuptools.build_meta import build_editable; build_editable('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(next((checkout / "wheel").glob("*.whl"))) as wheel:
        wheel.extractall(packages)
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return environment / "bin" / "python"


def diagnostics(python: Path, script: Path) -> dict[int, str]:
    """Line -> message of all errors and warnings of pyright."""
    if shutil.which("pyright", path=Path(sys.executable).parent) is None:
        pytest.skip("pyright is not installed: pip install '.[test]'")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python, script.name]
    run = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    if not run.stdout.startswith("{"):
        pytest.skip(f"pyright does not start here: {run.stderr.strip()[-200:]}")
    found = json.loads(run.stdout)["generalDiagnostics"]
    return {one["range"]["start"]["line"] + 1: one["message"] for one in found}


def test_names_resolve_and_mistakes_are_reported(python, tmp_path):
    """An import hook instead of a path, a `__getattr__` that takes any name, or one return type for both calls: no editor could help."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = diagnostics(python, script)
    assert found.keys() == WRONG.keys(), found
    assert all(words in found[line] for line, words in WRONG.items()), found


def test_an_editable_install_is_a_path(python):
    """What the import system does with hooks, static tools do not."""
    (path_file,) = python.parents[1].glob("lib/python*/site-packages/__editable__*.pth")
    assert Path(path_file.read_text().strip(), "maverick_jax", "sharding", "__init__.py").is_file()
