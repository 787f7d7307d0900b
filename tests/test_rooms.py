"""Rooms and floors: a room imports only from lower floors and from itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FLOORS = {
    "cli": 8,
    "peft": 7, "testing": 7,
    "verbs": 6,
    "export": 5,
    "formats": 4, "engines": 4, "live": 4,
    "adapter": 3, "store": 3,
    "tuners": 2,
    "algebra": 1, "select": 1, "registry": 1,
    "errors": 0,
}  # fmt: skip
OUTSIDE = {"__init__", "__main__"}  # the shop window, and the way in
LIGHT = ("store", "formats", "cli", "verbs", "select", "registry", "errors", "adapter", "tuners")
HEAVY = {"torch", "transformers", "peft"}
PACKAGE = ROOT / "adaptkit"
FILES = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}


def room(file: str) -> str:
    """room("store/entry.py") -> "store"."""
    return file.partition("/")[0].removesuffix(".py")


MODULES = [f for f in FILES if room(f) not in OUTSIDE]


def imported(file: str) -> Iterator[str]:
    """The rooms that a file imports from, anywhere in it."""
    parts = ("adaptkit", *Path(file).parts[:-1])
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*parts[: len(parts) + 1 - node.level]] if node.level else [])
            home = ".".join(filter(None, [start, node.module]))
            names = [f"{home}.{a.name}" for a in node.names]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("adaptkit."))


@pytest.mark.parametrize("file", MODULES)
def test_a_room_imports_only_from_lower_floors_and_itself(file: str):
    """One direction: what is below knows nothing of what is above, nor of its neighbours."""
    mine = room(file)

    up = [other for other in imported(file) if other != mine and FLOORS[other] >= FLOORS[mine]]

    assert not up, f"{file} (floor {FLOORS[mine]}) imports {', '.join(f'{u} ({FLOORS[u]})' for u in up)}"


def test_the_walk_sees_imports():
    """The test above would pass on nothing; it does see what is there."""
    assert {"store", "tuners", "errors"} <= set(imported("engines/plan.py"))
    assert "registry" in set(imported("formats/base.py"))
    assert set(imported("verbs/plugins.py")) == {"registry", "errors"}


def at_module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything that runs when a module is imported."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("file", [f for f in MODULES if room(f) in LIGHT])
def test_what_must_answer_at_once_imports_nothing_heavy(file: str):
    """torch and transformers take seconds; only functions that need them import them."""
    nodes = list(at_module_level(ast.parse(FILES[file].read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level]

    assert not {n.partition(".")[0] for n in names} & HEAVY
