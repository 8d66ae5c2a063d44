# SPDX-License-Identifier: MIT
"""The smallest script that shows what a rule found: the rule's own lines and what they need, as a file to send."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType

from .rule import Result

_FRAME = '''\
#!/usr/bin/env python3
"""Rule {id} of `vhost-vdpa check`: {sentence}

Source: {source}
Seen on {device}: {detail}

Run it as root; it resets the device:  python3 {file} {path}
It needs pyvhostvdpa (pip install pyvhostvdpa), the kernel's modules, and nothing else.
"""

{imports}

{body}


def main() -> int:
    path = sys.argv[1] if len(sys.argv) > 1 else {path!r}
    with Bench(path{options}) as bench:
        try:
            print("kept:", {call})
        except VhostVdpaError as e:
            print("broken:", e)
            return 1
        finally:
            for event in bench.trace.events:
                print("   ", line_of(event), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
_ALWAYS = (
    "from __future__ import annotations",
    "import sys",
    "from pyvhostvdpa import VhostVdpaError",
    "from pyvhostvdpa.probe.check.bench import Bench",
    "from pyvhostvdpa.probe.check.engine import line_of",
)


def file_name(result: Result) -> str:
    """Return what the script of a rule is called."""
    return result.rule.id.replace(".", "_") + ".py"


def script(result: Result, path: str, device: str, may_write: bool = False) -> str:
    """Return a script that does what the rule did, for the device at ``path``; ``device`` is it in words."""
    act = result.rule.act
    functions, call = _call(act)
    module = sys.modules[functions[0].__module__]
    tree = ast.parse(inspect.getsource(module))
    parts = _needed(tree, {each.__name__ for each in functions})
    imports = [*_ALWAYS, *_imports(tree, module, _names(parts))]
    return _FRAME.format(
        id=result.rule.id,
        sentence=result.rule.sentence,
        source=result.rule.source,
        device=device,
        detail=_in_a_docstring(result.detail),
        file=file_name(result),
        path=path,
        imports="\n".join(dict.fromkeys(imports)),
        body="\n\n\n".join(map(ast.unparse, parts)),
        call=call,
        options=", may_write=True" if may_write else "",
    )


def _call(act: Callable[..., str]) -> tuple[list[Callable[..., object]], str]:
    """Return the functions that a rule is made of, and how it is called; a rule may be one function with arguments."""
    if not isinstance(act, partial):
        return [act], f"{act.__name__}(bench)"
    given = [each for each in act.keywords.values() if callable(each)]
    words = [f"{name}={each.__name__ if callable(each) else repr(each)}" for name, each in act.keywords.items()]
    return [act.func, *given], f"{act.func.__name__}({', '.join(['bench', *words])})"


def _in_a_docstring(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace('"', "'")


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def _bare(node: ast.stmt) -> ast.stmt:
    """Return a statement without what registers it as a rule."""
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = [each for each in node.decorator_list if isinstance(each, ast.Name)]
    return node


def _needed(tree: ast.Module, functions: set[str]) -> list[ast.stmt]:
    """Return the statements of a module that these functions need, themselves included, in their order."""
    by_name = {name: node for node in tree.body for name in _defined(_bare(node))}
    wanted, left = set(), set(functions)
    while left:
        name = left.pop()
        if name in by_name and name not in wanted:
            wanted.add(name)
            left |= _names([by_name[name]])
    return [node for node in tree.body if set(_defined(node)) & wanted]


def _imports(tree: ast.Module, module: ModuleType, names: set[str]) -> list[str]:
    """Return the module's imports that these names need, with the package written out."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            found += [f"import {each.name}" for each in node.names if (each.asname or each.name) in names]
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            wanted = [each.name for each in node.names if (each.asname or each.name) in names]
            if wanted:
                found.append(f"from {_absolute(node, module)} import {', '.join(wanted)}")
    return found


def _absolute(node: ast.ImportFrom, module: ModuleType) -> str:
    if not node.level:
        return str(node.module)
    parts = module.__name__.split(".")[: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])
