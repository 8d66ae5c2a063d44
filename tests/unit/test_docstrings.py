"""Docstrings of what `pyvhostvdpa` exports: each names every argument and error, even one whose name explains it."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pyvhostvdpa
from pyvhostvdpa.base import errors

ERRORS = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
FROM_A_BASE = {"with_traceback", "add_note"}


def exported() -> Iterator[tuple[str, Any]]:
    for name in pyvhostvdpa.__all__:
        if not name.startswith("__"):
            yield name, getattr(pyvhostvdpa, name)


def public() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every callable of the public API with its name and all of its documentation."""
    for name, thing in exported():
        if inspect.isfunction(thing):
            yield name, thing, inspect.getdoc(thing) or ""
        elif inspect.isclass(thing):
            if "__init__" in vars(thing) and not issubclass(thing, enum.Enum):
                initial = vars(thing)["__init__"]
                yield name, initial, f"{inspect.getdoc(thing)}\n{initial.__doc__ or ''}\n{attributes(thing)}"
            for base in thing.__mro__:
                if base.__module__.startswith("pyvhostvdpa"):
                    for method, member in vars(base).items():
                        function = getattr(member, "__func__", member)
                        if not method.startswith("_") and inspect.isfunction(function) and method not in FROM_A_BASE:
                            yield f"{name}.{method}", function, inspect.getdoc(function) or ""


def attributes(kind: type) -> str:
    """Return the names of the fields of a class that have a docstring below them."""
    module = inspect.getmodule(kind)
    assert module is not None
    found = []
    for base in kind.__mro__:
        if not base.__module__.startswith("pyvhostvdpa"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            documents = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and documents:
                found.append(f"``{field.target.id}``")
    return " ".join(found)


CALLABLES = {name: (function, text) for name, function, text in public()}


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", [name for name, (function, _) in CALLABLES.items() if parameters(function)])
def test_docstring_of_a_public_callable_names_every_parameter(name: str) -> None:
    function, text = CALLABLES[name]
    assert [each for each in parameters(function) if f"``{each}``" not in text] == []


@pytest.mark.parametrize("name", [name for name, _ in exported() if inspect.isclass(getattr(pyvhostvdpa, name))])
def test_fields_of_a_public_dataclass_are_documented(name: str) -> None:
    kind = getattr(pyvhostvdpa, name)
    if not dataclasses.is_dataclass(kind):
        return
    text = f"{inspect.getdoc(kind)} {attributes(kind)}"
    assert [each.name for each in dataclasses.fields(kind) if f"``{each.name}``" not in text] == []


def raised(function: Callable[..., Any], helpers: bool = True) -> set[str]:
    """The package's errors that a function raises itself, or a helper of its class that it calls."""
    if not inspect.unwrap(function).__code__.co_filename.endswith(".py"):
        # made by dataclasses
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = set()
    owner = getattr(inspect.getmodule(function), function.__qualname__.partition(".")[0], None)
    for node in ast.walk(tree):
        if helpers and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func
            helper = getattr(owner, called.attr, None) if ast.unparse(called.value) == "self" else None
            if called.attr.startswith("_") and inspect.isfunction(helper):
                found |= raised(helper, helpers=False)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
    return found & ERRORS


@pytest.mark.parametrize("name", [name for name, (function, _) in CALLABLES.items() if raised(function)])
def test_docstring_of_a_public_callable_names_the_errors_that_it_raises(name: str) -> None:
    function, text = CALLABLES[name]
    said = re.split(r"\b[Rr]aises\b", text, maxsplit=1)
    assert len(said) == 2, "no word of what it raises"
    assert [each for each in raised(function) if each not in said[1]] == []
