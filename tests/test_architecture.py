"""The house rules that a machine can check: imports go down the list of rooms, and importing rewrites is cheap."""

import ast
import pathlib
import subprocess
import sys

import pytest

import nnopt

PACKAGE = pathlib.Path(nnopt.__file__).parent
EVERYWHERE = {"errors", "typing"}
BELOW = {
    "errors": set(),
    "typing": set(),
    "core": set(),
    "layers": {"core"},
    "networks": set(),
    "nests": {"layers", "core"},
    "rewrites": {"core", "layers", "nests"},
    "scores": {"core", "layers", "costs"},
    "costs": {"core", "nests"},
    "backends": {"core", "nests"},
    "data": set(),
    "training": {"core", "rewrites", "data", "layers"},
}
LOW = {*BELOW, "networks"}
BELOW["search"] = LOW
BELOW["reports"] = {*LOW, "search"}
BELOW["cli"] = {*LOW, "search", "reports"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(source: str) -> set[str]:
    """Rooms of nnopt that a source text imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names} | {node.module or ""}
    parts = [name.split(".") for name in names if name.split(".")[0] == "nnopt"]
    return {p[1] for p in parts if len(p) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in BELOW, f"{room} is not in the table of rooms"
    # The table lists what it takes to stand on its own; the networks import nothing of nnopt but themselves.
    allowed = {room} if room == "networks" else {room, *BELOW[room], *EVERYWHERE}
    assert imported_rooms(path.read_text()) <= allowed


def test_the_parser_sees_imports():
    source = (
        "import nnopt.core.sites\ndef f():\n    from nnopt.search import x\nfrom nnopt import cli"
    )
    assert imported_rooms(source) == {"core", "search", "cli"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_rewrites_costs_jax_and_flax_and_nothing_more():
    heavy = {"tvm", "ray", "matplotlib", "sklearn", "rich", "tyro", "orbax", "optax", "scipy"}
    flax_alone = modules_after("import flax.linen")
    ours = modules_after("import nnopt.rewrites")
    assert {"jax", "flax", "nnopt"} <= ours
    assert not (ours - flax_alone) & heavy
    # Of everything installed, only the standard library may come in besides.
    assert not {
        name for name in ours - flax_alone - {"nnopt"} if name not in sys.stdlib_module_names
    }
