"""Tests that are not run with every change know no private name that is gone from the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SELDOM = ("soak", "kernel", "pair", "icount", "benchmarks")


def defined(tree: ast.AST) -> set[str]:
    """Names that a module gives to something itself."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    return found | {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in stored}


@pytest.mark.parametrize("folder", SELDOM)
def test_private_names_in_tests_are_those_of_the_package(folder: str) -> None:
    known = {name for path in ROOT.glob("pyvhostvdpa/**/*.py") for name in re.findall(r"\b_\w+", path.read_text())}
    trees = {path: ast.parse(path.read_text()) for path in ROOT.glob(f"tests/{folder}/**/*.py")}
    assert trees
    for tree in trees.values():
        known |= defined(tree)
    gone = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr) and node.attr not in known
    ]
    assert gone == []
