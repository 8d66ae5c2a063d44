# SPDX-License-Identifier: MIT
"""What ``vhost-vdpa help`` prints: the pages in ``docs/``, and references made from docstrings and tables."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

from ..base.causes import errno_text, explain_all
from ..base.errors import MissingFeature
from ..base.uapi import IOCTLS
from ..chardev.door import VhostVdpa
from .commands import columns
from .render import terminal
from .table import wrap

PACKAGE = __name__.partition(".")[0]
_WIDEST = 80
"""Columns of a page on a wide terminal: longer lines are hard to read."""
_LONGEST_DEFAULT = 40
_ROLE = re.compile(r":\w+:`~?(?:[^`<]*<)?(?:pyvhostvdpa\.)?([^`>]+)>?`")
"""A reference of the site's generator: what it leads to."""
GENERATED = {
    "api": "every public class and function; api NAME for one of them",
    "ioctls": "every request of linux/vhost.h, and the method that makes it",
    "errors": "what each errno of each request means, and what to do",
}


def topics() -> dict[str, str]:
    """Return the topics there are, with one line each."""
    pages = {each.name.removesuffix(".md"): _title(each.read_text()) for each in _pages()}
    return {**dict(sorted(pages.items())), **GENERATED}


def text(topic: str, name: str = "") -> str:
    """Return a topic's text; MissingFeature names the topics there are."""
    generators = {"ioctls": ioctls, "errors": errors}
    if topic == "api":
        return fitted(api(name))
    if topic in generators:
        return fitted(generators[topic]())
    found = page(topic)
    if found:
        return found
    raise MissingFeature(f"no help on {topic!r}", hint=f"vhost-vdpa help TOPIC, one of: {', '.join(topics())}")


def fitted(text: str) -> str:
    """Return text in lines of the terminal's width, at most 80: what is longer continues, further to the right."""
    width = min(columns(), _WIDEST)
    lines: list[str] = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += [line] if len(line) <= width else wrap(line, indent, f"{indent}  ", width).splitlines()
    return "\n".join(lines)


def page(topic: str) -> str:
    """Return a page that ships, as a terminal shows it; "" for an unknown name."""
    found = next((each for each in _pages() if each.name == f"{topic}.md"), None)
    return terminal(found.read_text(), found.parent, min(columns(), _WIDEST)) if found else ""


def _pages() -> list[Path]:
    folder = resources.files(f"{PACKAGE}.cli") / "docs"
    return sorted(Path(str(each)) for each in folder.iterdir() if each.name.endswith(".md"))


def _title(text: str) -> str:
    return text.partition("\n")[0].lstrip("# ")


def _doc(thing: object) -> str:
    """Return a docstring with its references as plain names."""
    return _ROLE.sub(r"``\1``", inspect.getdoc(thing) or "")


def _first_line(thing: object) -> str:
    return _doc(thing).partition("\n")[0]


def modules() -> Iterator[ModuleType]:
    """Yield every module of the package, but for the command line."""
    package = importlib.import_module(PACKAGE)
    for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        inner = found.name.removeprefix(f"{PACKAGE}.")
        if not inner.startswith(("_", "cli")):
            yield importlib.import_module(found.name)


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield the names and things that a module defines for others."""
    for name, thing in vars(module).items():
        own = getattr(thing, "__module__", "") == module.__name__
        if own and not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield name, thing


def api(name: str = "") -> str:
    """Return the list of everything public by module, or one thing with all of its methods."""
    if name:
        return _describe(name)
    lines = []
    for module in modules():
        members = list(public(module))
        lines += ["", f"{module.__name__}: {_first_line(module)}"] if members else []
        lines += [f"  {each:<24} {_first_line(thing)}" for each, thing in members]
    return "\n".join(lines).strip()


def _describe(wanted: str) -> str:
    for module in modules():
        for name, thing in public(module):
            if wanted in (name, f"{module.__name__}.{name}"):
                return "\n".join(describe(name, thing, module.__name__))
    package = importlib.import_module(PACKAGE)
    if wanted in package.__all__:
        return f"from {PACKAGE} import {wanted}\n\n{wanted} = {getattr(package, wanted)!r}"
    raise MissingFeature(f"nothing public is called {wanted!r}", hint="vhost-vdpa help api lists all names")


def describe(name: str, thing: object, module: str) -> list[str]:
    """Return the page of a class or function, as lines."""
    lines = [f"from {module} import {name}", "", f"{name}{_signature(thing)}", *_indented(_doc(thing))]
    if isinstance(thing, enum.EnumMeta):
        lines += ["", *(f"    {member.name} = {member.value}" for member in list[enum.Enum](thing))]
    if inspect.isclass(thing):
        for method, function in _members(thing):
            if isinstance(function, property):
                lines += ["", f"    {method}", *_indented(_doc(function), 8)]
            elif inspect.isfunction(function) or isinstance(function, classmethod):
                target = getattr(thing, method)
                lines += ["", f"    {method}{_signature(target)}", *_indented(_doc(target), 8)]
    return lines


def _members(thing: type) -> Iterator[tuple[str, object]]:
    """Yield what is public in a class: its own, then what it has from the package's other classes."""
    bases = [each for each in thing.__mro__ if each.__module__.startswith(f"{PACKAGE}.")]
    for name in dict.fromkeys(name for each in bases for name in vars(each)):
        if not name.startswith("_"):
            yield name, inspect.getattr_static(thing, name)


def _signature(thing: object) -> str:
    try:
        signature = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    given = signature.parameters.values()
    shown = [each if each.default is each.empty else each.replace(default=_Default(each.default)) for each in given]
    return str(signature.replace(parameters=shown)).replace("'", "")


class _Default:
    """A default value as one would write it; "…" for what has no short name."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        if isinstance(value, str):
            return f'"{value}"'
        name = str(getattr(value, "__name__", ""))
        if isinstance(value, enum.Enum):
            name = f"{type(value).__name__}.{value.name}"
        text = name or repr(value)
        return "…" if set(text) & set("<|") or len(text) > _LONGEST_DEFAULT else text


def _indented(doc: str | None, by: int = 4) -> list[str]:
    return [f"{'':{by}}{line}".rstrip() for line in (doc or "").splitlines()]


def ioctls() -> str:
    """Return the table of requests with their methods."""
    lines = []
    for row in IOCTLS.values():
        owner = "owner" if row.needs_owner else ""
        what = f"never served: {row.rejected}" if row.rejected else _first_line(getattr(VhostVdpa, row.method))
        lines.append(f"{row.request:#010x}  {row.name:<34} {row.since:<5} {owner:<6} {row.method}()")
        lines.append(f"{'':12}{what}")
    return "\n".join(lines)


def errors() -> str:
    """Return the table of causes."""
    lines = []
    for call, number, why in explain_all():
        lines += [f"{call}: {errno_text(number)}", f"    {why.cause}", f"    next: {why.hint}"]
    return "\n".join(lines)
