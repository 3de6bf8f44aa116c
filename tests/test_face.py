"""The public names: that they are there, that they are the same for jax's lazy import and for editors, and what a wrong one is told."""

import ast
import importlib
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import maverick_jax as mj


def imported_for_editors() -> dict[str, str]:
    """Public name -> where the imports under TYPE_CHECKING find it."""
    (block,) = (node for node in ast.parse(Path(mj.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}


def test_three_lists_say_the_same():
    """A name that is in one alone works and is unknown to editors, or the other way round."""
    homes = mj._HOME | {name: name for name in mj._PACKAGES}
    assert imported_for_editors() == {name: f"maverick_jax.{home}" for name, home in homes.items()}
    assert set(mj.__all__) == set(mj._HOME)


@pytest.mark.parametrize("name", mj.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name):
    """`help` of each has more than a signature."""
    assert callable(getattr(mj, name))
    assert len(inspect.getdoc(getattr(mj, name)) or "") > 20


def test_packages_are_not_hidden():
    """`convert` is a package and a function in it; the function is public under another name."""
    assert isinstance(mj.convert, ModuleType)
    assert isinstance(mj.sharding, ModuleType)
    assert mj.convert_checkpoint is mj.convert.convert
    assert mj.export_checkpoint is mj.convert.export


def test_what_tab_completion_shows():
    assert dir(mj) == sorted([*mj.__all__, "__version__", "convert", "sharding"])
    assert "make_mesh" in pydoc.render_doc(mj)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("lod", "did you mean 'load'?"),
        ("llama4", "did you mean 'Llama4'?"),
        ("AutoTokenizer", "did you mean 'Tokenizer'?"),
        ("SamplingParams", "did you mean 'Sampling'?"),
        ("from_pretrained", r"there are Chat, .*, verify_checkpoint; load\(path\) opens a model"),
    ],
)
def test_a_wrong_name_is_told_its_neighbour(name, hint):
    with pytest.raises(AttributeError, match=f"module 'maverick_jax' has no attribute '{name}': {hint}"):
        getattr(mj, name)
    with pytest.raises(ImportError, match=f"cannot import name '{name}'"):
        exec(f"from maverick_jax import {name}")


def test_nothing_is_imported_before_it_is_used():
    """`maverick --help` waits for no jax; `Tokenizer` needs none at all."""
    code = "import sys, maverick_jax as mj; mj.Tokenizer; dir(mj); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_arguments_of_a_model_are_shown():
    """flax's metaclass shows `(*args, **kwargs)`; an instance takes what its call takes."""
    shown = inspect.signature(mj.Llama4)
    assert list(shown.parameters) == ["config", "dispatcher", "attend", "constrain", "dtype", "rngs"]
    assert "rngs: 'nnx.Rngs'" in pydoc.render_doc(mj.Llama4, renderer=pydoc.plaintext)
    with pytest.raises(AttributeError, match="__signature__"):
        object.__getattribute__(object.__new__(mj.Llama4), "__signature__")


def test_a_config_prints_what_makes_it():
    """It can be copied from a notebook into a script."""
    names = vars(importlib.import_module("maverick_jax.config"))
    for config in (mj.Config.maverick(), mj.Config.scout()):
        assert eval(repr(config), dict(names)) == config
