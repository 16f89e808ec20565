"""Imports point down: a module uses only floors below its own, and what is heavy stays off the
ground floor.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "axes": -0.1,
    "config": 0.0,
    "files": 0.0,
    "display": 0.0,
    "signals": 0.0,
    "tables": 0.1,
    "settings": 0.1,
    "unknown_arguments": 0.1,
    "command": 0.2,
    "program": 0.3,
    "kernels": 1,
    "text": 1,
    "data": 1.5,
    "precision": 2,
    "parallel": 3,
    "model": 4,
    "vision": 4.5,
    "generate": 5,
    "checkpoint": 5,
    "infer": 5.5,
    "serve": 6,
    "show": 6,
    "train": 6,
    "curate": 6,
    "posttrain": 7,
    "janus": 7.5,
    "plan": 8,
}
# the floors below take explicit arguments, so that they can be read and tested alone
CONFIG_FROM = 4
MODULES = sorted(path for path in (ROOT / "dsjax").rglob("*.py") if path.parent.name != "dsjax")
MODULES += [path for path in (ROOT / "dsjax").glob("*.py") if path.name != "__init__.py"]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]


def imports(tree):
    """Yields (module, relative level) of every import below a syntax tree, function bodies
    included.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module == "dsjax":
                yield from ((f"dsjax.{alias.name}", node.level) for alias in node.names)
            else:
                yield module, node.level


def unit(path):
    return path.relative_to(ROOT / "dsjax").parts[0].removesuffix(".py")


def violations(path, text):
    own = unit(path)
    for module, level in imports(ast.parse(text)):
        if level:
            yield f"relative import of {module!r}"
        parts = module.split(".")
        if parts[0] != "dsjax" or len(parts) < 2 or parts[1] == own:
            continue
        if parts[1] == "__version__":
            continue
        if FLOORS[parts[1]] >= FLOORS[own]:
            yield f"{own} (floor {FLOORS[own]}) imports {module} (floor {FLOORS[parts[1]]})"
        if parts[1] in ("config", "settings") and 1 <= FLOORS[own] < CONFIG_FROM:
            yield f"{own} (floor {FLOORS[own]}) imports {module}; pass explicit arguments"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_are_absolute_and_point_down(path):
    assert list(violations(path, path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from dsjax.train import loop", "model (floor 4) imports dsjax.train (floor 6)"),
        ("def f():\n    import dsjax.generate.sampling", "imports dsjax.generate.sampling"),
        ("from . import rope", "relative import"),
        ("from dsjax import train", "imports dsjax.train"),
    ],
)
def test_violations_are_found(source, found):
    assert found in " ".join(violations(ROOT / "dsjax/model/x.py", source))


def circles(sources):
    """Yields the import circles among modules, given as {dotted name: text}; imports for type
    checkers alone and inside functions count.
    """
    needs = {}
    for name, text in sources.items():
        needs[name] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                submodules = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [module if module in sources else node.module for module in submodules]
            else:
                continue
            needs[name] |= {module for module in found if module in sources and module != name}

    def visit(name, path):
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for module in sorted(needs[name]):
                yield from visit(module, [*path, name])
            done.add(name)

    done = set()
    for name in sorted(sources):
        yield from visit(name, [])


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_modules_do_not_import_each_other_in_circles():
    modules = {dotted(path): path.read_text() for path in (ROOT / "dsjax").rglob("*.py")}
    assert list(circles(modules)) == []


def test_circles_are_found():
    sources = {
        "dsjax.a": "from dsjax.b import x",
        "dsjax.b": "if TYPE_CHECKING:\n    from dsjax import c",
        "dsjax.c": "def f():\n    import dsjax.a",
        "dsjax.d": "import dsjax.a",
    }
    assert list(circles(sources)) == ["dsjax.a -> dsjax.b -> dsjax.c -> dsjax.a"]


def test_config_is_refused_to_the_low_floors():
    found = list(violations(ROOT / "dsjax/parallel/x.py", "from dsjax.config import Config"))
    assert found == ["parallel (floor 3) imports dsjax.config; pass explicit arguments"]


@pytest.mark.parametrize("name", ["axes", "config", "files", "settings", "command"])
def test_ground_floor_needs_only_the_standard_library(name):
    place = ROOT / "dsjax" / name
    paths = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    tops = {
        module.split(".")[0] for path in paths for module, _ in imports(ast.parse(path.read_text()))
    }
    assert tops <= sys.stdlib_module_names | {"dsjax"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "dsjax/text").glob("*.py")), ids=lambda path: path.name
)
def test_text_does_without_jax(path):
    tops = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()))}
    assert not tops & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_import_only_light_modules_at_the_top(path):
    body = ast.parse(path.read_text()).body
    top = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    for module, _ in imports(top):
        light = module.split(".")[0] in sys.stdlib_module_names
        light |= f"{module}.".startswith("dsjax.config.")
        assert light or module in ("dsjax.settings", "dsjax.command"), module
