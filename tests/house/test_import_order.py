"""Lower packages never import higher ones, and no two modules each other: what a module may know is decided by where it lies."""

import ast
import graphlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "maverick_jax"
ORDER = [  # lowest first; neighbours on one line do not know each other
    {"errors", "json_file", "stand_ins", "config"},
    {"ops"},
    {"sharding"},
    {"model"},
    {"convert", "assets"},
    {"adapter"},
    {"checkpoint"},
    {"inference"},
    {"serving", "training"},
    {"plan"},
    {"bench"},
    {"check"},
    {"cli"},
    {"__main__"},
]
BASE = ORDER[0]
ROOMS = ["formats", "build", "proof"]  # of `convert`, lowest first
RANK = {package: rank for rank, packages in enumerate(ORDER) for package in packages}
PROMPT_USERS = {"assets", "convert", "inference", "serving", "training", "plan", "cli", "__main__"}


def sources() -> list[Path]:
    """Every module, those behind the symbolic links included; the package's own face may import anything."""
    found = [Path(folder) / name for folder, _, names in os.walk(ROOT, followlinks=True) for name in names if name.endswith(".py")]
    return sorted(path.relative_to(ROOT) for path in found if path != ROOT / "__init__.py")


def package_of(module: str) -> str:
    """`maverick_jax.ops.rope` -> `ops`; the package itself -> ``."""
    return ".".join(module.split(".")[1:2])


def imported_packages(tree: ast.AST) -> set[str]:
    """Our packages that a module imports at run time, imports inside functions included."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {package_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "maverick_jax"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            if node.module == "maverick_jax":
                known = RANK.keys() | {"prompt"}
                found |= {alias.name if alias.name in known else "" for alias in node.names}
            elif node.module and node.module.startswith("maverick_jax."):
                found.add(package_of(node.module))
        else:
            found |= imported_packages(node)
    return found


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or (importer in BASE and imported in BASE):
        return True
    if importer == "prompt":
        return imported in BASE
    if imported == "prompt":
        return importer in PROMPT_USERS
    if imported == "":  # the package's face imports everything
        return RANK[importer] >= RANK["cli"]
    return RANK[imported] < RANK[importer]


def module_name(path: Path) -> str:
    """`ops/rope.py` -> `maverick_jax.ops.rope`; a package is its `__init__.py`."""
    return ".".join(["maverick_jax", *path.with_suffix("").parts]).removesuffix(".__init__")


def imported_modules(tree: ast.AST, modules: set[str]) -> set[str]:
    """Those of `modules` that are imported anywhere in a file, for type checkers too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def find_circle(code: dict[str, str]) -> list[str]:
    """Modules that import each other in a ring, the first again at the end; none gives an empty list."""
    graph = {module: imported_modules(ast.parse(text), set(code)) - {module} for module, text in code.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_two_modules_import_each_other():
    """Inside a package too, and for type checkers too: of two files in a circle neither can be read first."""
    assert not find_circle({module_name(path): (ROOT / path).read_text(encoding="utf-8") for path in sources()})


def test_a_circle_is_found():
    """A rule that never fails keeps nothing."""
    ring = {"a": "if TYPE_CHECKING:\n    from b import B", "b": "def f():\n    import c", "c": "from a import A", "d": "import a"}
    assert set(find_circle(ring)) == {"a", "b", "c"}
    assert not find_circle({"a": "from b import c", "b": "", "b.c": "import b"})


@pytest.mark.parametrize("path", [path for path in sources() if path.parts[0] == "convert" and path.parts[1] in ROOMS], ids=str)
def test_the_rooms_of_convert_point_downwards(path):
    """What reads knows nothing of what makes, and what makes nothing of what proves."""
    modules = {module_name(path) for path in sources()}
    imported = imported_modules(ast.parse((ROOT / path).read_text(encoding="utf-8")), modules)
    above = {f"maverick_jax.convert.{room}" for room in ROOMS[ROOMS.index(path.parts[1]) + 1 :]} | {"maverick_jax.convert"}
    assert not {name for name in imported if name in above or name.rpartition(".")[0] in above - {"maverick_jax.convert"}}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_downwards(path):
    """An import upwards makes two packages one: neither can be read, tested or replaced alone."""
    importer = path.parts[0].removesuffix(".py")
    assert importer in RANK or importer == "prompt", f"{importer} is new: give it a place in the order"
    imported = imported_packages(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    assert not {name or "maverick_jax" for name in imported if not allowed(importer, name)}


def test_every_package_is_looked_at():
    """The two symbolic links are followed, or their packages would import what they like."""
    assert {"ops", "sharding", "model", "inference"} <= {path.parts[0] for path in sources()}


@pytest.mark.parametrize(
    "code, importer, good",
    [
        ("from maverick_jax.model import Llama4", "ops", False),
        ("def f():\n    from maverick_jax import checkpoint", "model", False),
        ("if TYPE_CHECKING:\n    from maverick_jax.inference.cache import KVCache", "model", True),
        ("import maverick_jax as mj", "inference", False),
        ("import maverick_jax as mj", "cli", True),
        ("from maverick_jax.serving import server", "training", False),
        ("from maverick_jax.prompt import Prompt", "model", False),
    ],
)
def test_the_check_sees_what_it_should(code, importer, good):
    """A rule that never fails keeps nothing."""
    assert all(allowed(importer, name) for name in imported_packages(ast.parse(code))) is good
