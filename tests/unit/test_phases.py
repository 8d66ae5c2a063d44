"""The names of measured phases: each is spelled in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pyvhostvdpa
from pyvhostvdpa.trace import phases

PACKAGE = Path(pyvhostvdpa.__file__).parent


def literals(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_phase_names_are_spelled_in_phases_only() -> None:
    spelled = {
        (str(file.relative_to(PACKAGE)), text)
        for file in PACKAGE.rglob("*.py")
        for text in literals(file)
        if text in phases.PHASES
    }
    assert spelled == {("trace/phases.py", name) for name in phases.PHASES}
