"""The layout that CONTRIBUTING.md describes: imports point down, from one floor to a lower one, and form no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import stabrun

ROOT = Path(stabrun.__file__).parent
FLOORS = (  # from the ground up; rooms of one floor do not import each other
    ("config", "interpreter", "text", "version"),
    ("bounds",),
    ("safety", "variants"),
    ("composition",),
    ("record",),
    ("foreign", "verdict"),
    ("model", "data"),
    ("observe",),
    ("training",),
    ("study", "watching"),
    ("report",),
    ("publish",),
    ("api",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = ("config", "text", "composition", "record", "foreign", "verdict")


def modules():
    """Dotted name → source file of each module of the package, `__init__` files included if they hold code."""
    for file in ROOT.rglob("*.py"):
        name = ".".join(("stabrun", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        if name != "stabrun":
            yield name, file


def imports(file, known):
    """The modules of the package that a file imports, within functions as well, and the other packages."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            found = next((".".join(parts[:n]) for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in known), None)
            (own if found else foreign).add(found or parts[0])
    return own, foreign


def room(module):
    return module.split(".")[1]


def test_imports_point_down():
    known = dict(modules())
    wrong = [
        f"{name} imports {other}"
        for name, file in known.items()
        for other in imports(file, known)[0]
        if room(name) != room(other) and FLOOR[room(name)] <= FLOOR[room(other)]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_form_no_circle():
    known = dict(modules())
    graph = {name: imports(file, known)[0] - {name} for name, file in known.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_verdict_and_what_lies_below_import_no_torch():
    known = dict(modules())
    for name, file in known.items():
        if room(name) in TORCH_FREE:
            assert "torch" not in imports(file, known)[1], name
