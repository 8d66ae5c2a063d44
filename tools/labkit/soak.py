"""Tests that are too long for every day: tests/soak/*.py, each in a VM of its own choosing, or in none."""

import shlex
from pathlib import Path

from labkit import in_tree
from labkit.errors import LabError
from labkit.session import Request, Session

FOLDER = "tests/soak"
MARK = "# lab:"
ALSO = "# also:"


def available(project: Path) -> dict[str, Path]:
    """Return the soak tests by name."""
    files = sorted((project / FOLDER).glob("[!_]*.py"))
    return {path.stem.removeprefix("test_"): path for path in files if path.name != "conftest.py"}


def choose(project: Path, name: str) -> Path:
    """Return the file of a soak test."""
    known = available(project)
    name = name.replace("-", "_")
    if name not in known:
        raise LabError(
            f"there is no soak test {name!r}", f"There are: {', '.join(known) or 'none yet'}.", "tools/lab soak"
        )
    return known[name]


def options(path: Path) -> list[str]:
    """Return the lab's options that a file asks for in lines `# lab: --devices … --memory …`."""
    return _marked(path, MARK)


def tests(project: Path, path: Path) -> list[str]:
    """Return the tests to run: the file, and what it names in lines `# also: tests/kernel/…`."""
    return [str(path.relative_to(project)), *_marked(path, ALSO)]


def _marked(path: Path, mark: str) -> list[str]:
    lines = path.read_text().splitlines()
    return [word for line in lines if line.startswith(mark) for word in shlex.split(line.removeprefix(mark))]


def summary(path: Path) -> str:
    """Return the first line of a file's docstring."""
    for line in path.read_text().splitlines():
        if line.startswith('"""'):
            return line.strip('" ')
    return ""


def run_in_tree(session: Session, request: Request) -> int:
    """Run a test that needs no device in the lab's tree, and return pytest's exit status."""
    session.set_up(request.kernel, "soak")
    with session.using():
        hint = "tools/lab soak NAME --timeout S"
        return in_tree.run(session, request.command, request.timeout, hint, request.environment)
