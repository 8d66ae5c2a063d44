"""The rooms of the package: every module lies in one, and imports go down only.

The graph is read from the source. ``python3 tests/unit/test_house.py`` prints it.
"""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pyvhostvdpa"
GUIDE = Path(__file__).parents[2] / ".github" / "CONTRIBUTING.md"

FLOORS = {
    "base": 1,
    "trace": 2,
    "memory": 2,
    "chardev": 3,
    "virtqueue": 3,
    "host": 4,
    "net": 4,
    "device": 5,
    "guest": 6,
    "migration": 7,
    "vhost_user": 7,
    "probe": 7,
    "bench": 8,
    "cli": 9,
}
SAME_FLOOR = {("vhost_user", "migration")}
"""Two bridges talk to each other over the channel that a migration has."""
OPENS_NOTHING = "host"
"""Has to know a machine without opening a device, so it may not import the room that can."""
GUEST_SEAM = {"guest.protocol", "guest.shape", "guest.codec"}
"""All that migration/ may know of a guest: the protocol, and what every guest's shape is like."""
MAKES_GUESTS = {"migration.local", "migration.child"}
"""Both ends of `migrate`, which starts a synthetic guest of its own: they may import that one kind as well."""
ENTRANCES = {"__init__.py", "__main__.py", "_cdefs.pyi", "py.typed"}
"""What lies on the first level beside the rooms: it may import every room."""


@dataclass(frozen=True, order=True)
class Arrow:
    """One import, or one start of a module as a program."""

    source: str
    target: str
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.source), room_of(self.target)

    def __str__(self) -> str:
        return f"{self.source}:{self.line} -> {self.target}"


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def sources(package: Path) -> dict[str, Path]:
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


def arrows(package: Path) -> Iterator[Arrow]:
    """Yield every import between modules of the package, and every module that one starts as a program."""
    modules = sources(package)
    for name, path in modules.items():
        base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            for target in _targets(node, [part for part in base if part], modules):
                if target != name:
                    yield Arrow(name, target, getattr(node, "lineno", 0))


def _targets(node: ast.AST, base: list[str], modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        if node.level:
            parts = base[: len(base) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif node.module and node.module.partition(".")[0] == "pyvhostvdpa":
            parts = node.module.split(".")[1:]
        else:
            return
        for alias in node.names:
            inner = ".".join([*parts, alias.name])
            yield inner if inner in modules else ".".join(parts)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("pyvhostvdpa."):
                yield alias.name.removeprefix("pyvhostvdpa.")
    elif isinstance(node, ast.List | ast.Tuple):
        # [sys.executable, "-m", "pyvhostvdpa…"]: an import that no import statement shows
        for flag, program in itertools.pairwise(node.elts):
            if isinstance(flag, ast.Constant) and flag.value == "-m":
                name = program.value if isinstance(program, ast.Constant) else ""
                if isinstance(name, str) and name.startswith("pyvhostvdpa"):
                    yield name.removeprefix("pyvhostvdpa").lstrip(".") or "cli"


def wrong(package: Path) -> list[str]:
    """Return what breaks the rules of the house, one sentence each."""
    found = [
        f"{name} lies in no room: rooms are {', '.join(FLOORS)}"
        for name, path in sources(package).items()
        if room_of(name) not in FLOORS and path.name not in ENTRANCES
    ]
    between_rooms: dict[str, set[str]] = defaultdict(set)
    between_modules: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows(package):
        here, there = arrow.rooms
        if here not in FLOORS:
            continue
        between_modules[arrow.source].add(arrow.target)
        if there not in FLOORS:
            # cli has the examples, which are programs of users
            if there != "_cdefs" and here != "cli":
                found.append(f"{arrow}: a room imports the package's entrance")
        elif here != there:
            between_rooms[here].add(there)
            if FLOORS[there] >= FLOORS[here] and (here, there) not in SAME_FLOOR:
                found.append(f"{arrow}: an arrow up, from {here} to {there}")
            if (here, there) == (OPENS_NOTHING, "chardev"):
                found.append(f"{arrow}: {OPENS_NOTHING} opens no device")
            if (here, there) == ("migration", "guest") and not knows_only_the_protocol(arrow):
                found.append(f"{arrow}: migration knows no concrete guest")
    found += [f"a circle of rooms: {' -> '.join(each)}" for each in circles(between_rooms)]
    found += [f"a circle of modules: {' -> '.join(each)}" for each in circles(between_modules)]
    return found


def knows_only_the_protocol(arrow: Arrow) -> bool:
    allowed = GUEST_SEAM | {"guest.synthetic"} if arrow.source in MAKES_GUESTS else GUEST_SEAM
    return arrow.target in allowed


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return one path for each circle that a depth-first walk closes."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        for following in sorted(graph.get(name, ())):
            walk(following, [*path, name])
        done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def picture(package: Path) -> str:
    """Draw the rooms by floor, with what each imports."""
    imports: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows(package):
        here, there = arrow.rooms
        if here in FLOORS and there in FLOORS and here != there:
            imports[here].add(there)
    present = {room_of(name) for name in sources(package)}
    rows = []
    for room, floor in sorted(FLOORS.items(), key=lambda item: (-item[1], item[0])):
        if room in present:
            below = sorted(imports[room], key=lambda each: (-FLOORS[each], each))
            rows.append(f"{floor}  {room:<10} {' '.join(below) or '-'}".rstrip())
    return "\n".join(rows)


def test_house_imports_go_down_without_circles() -> None:
    assert wrong(PACKAGE) == []


def test_first_level_has_only_the_rooms_and_the_entrances() -> None:
    names = {path.name for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__"))}
    rooms = names - ENTRANCES - {name for name in names if name.endswith(".so")}
    assert rooms <= set(FLOORS), f"no room is called {sorted(rooms - set(FLOORS))}"
    assert len(rooms) <= 14


def test_contributing_shows_todays_picture_of_the_rooms() -> None:
    assert picture(PACKAGE) in GUIDE.read_text(), "python3 tests/unit/test_house.py prints the picture as it is now"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"base/low.py": "from ..cli import main", "cli/main.py": ""}, "an arrow up, from base to cli"),
        ({"memory/a.py": "from ..trace import b", "trace/b.py": ""}, "an arrow up, from memory to trace"),
        ({"net/a.py": "from . import b", "net/b.py": "def f():\n    from . import a"}, "a circle of modules"),
        ({"host/a.py": "from ..chardev import b", "chardev/b.py": ""}, "host opens no device"),
        ({"migration/a.py": "from ..guest import b", "guest/b.py": ""}, "migration knows no concrete guest"),
        ({"stray.py": ""}, "stray lies in no room"),
        ({"attic/a.py": ""}, "attic.a lies in no room"),
        ({"base/a.py": "import pyvhostvdpa.cli.b", "cli/b.py": ""}, "an arrow up, from base to cli"),
        (
            {"migration/a.py": "import sys\nARGV = [sys.executable, '-m', 'pyvhostvdpa', 'receive']", "cli/b.py": ""},
            "an arrow up, from migration to cli",
        ),
    ],
)
def test_house_rule_broken_is_reported(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    package = tmp_path / "pyvhostvdpa"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent != package:
            (path.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    assert any(expected in each for each in wrong(package)), wrong(package)


if __name__ == "__main__":
    print(picture(PACKAGE))
