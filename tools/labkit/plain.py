"""`tools/lab soak plain`: the unit tests without the lab, on bare Debian trees.

The commands are those of CONTRIBUTING, word by word; what pip installs comes from PyPI.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from labkit.bare import BARE, BareTree, Recipe
from labkit.errors import LabError
from labkit.progress import seconds
from labkit.session import PROJECT, Session

NAME = "plain"
SUMMARY = "pip install '.[dev]' and the unit tests, on bare Debian 12 and 13 with their own compilers and headers."
PAGE = ".github/CONTRIBUTING.md"
COMMANDS = re.compile(r"Without the lab[^`]*\(`(apt install [^`]*)`\):\n\n    (.*)\n")
LIMIT_S = 3600.0
COPY = "/root/project"
# Neither what is built here nor the history: a checkout without any build.
_NOT_COPIED = ("./.git", "./build", "./dist", "__pycache__", "*.so", "./.*_cache")


@dataclass(frozen=True)
class Outcome:
    """The result of the tests on one tree."""

    recipe: Recipe
    status: int
    said: str

    @property
    def last_line(self) -> str:
        """What pytest says of all tests, or the last words of what came before it."""
        return next((line for line in reversed(self.said.splitlines()) if line.strip()), "")


def commands(page: str) -> tuple[str, str]:
    """Return what CONTRIBUTING has installed by apt, and what it has run; LabError if it no longer has them."""
    found = COMMANDS.search(page)
    if found is None:
        raise LabError(
            f"{PAGE} does not say how to run the tests without the lab", "", f"grep -n 'Without the lab' {PAGE}"
        )
    return found[1], found[2]


def script(page: str) -> str:
    """Return what runs in a bare tree: the project is copied, since it is built where it lies."""
    install, run = commands(page)
    without = shlex.join(f"--exclude={each}" for each in _NOT_COPIED)
    copy = f"mkdir {COPY} && tar -c -C /lab/project {without} . | tar -x -C {COPY} && cd {COPY}"
    return "\n".join(["set -e", copy, f"{install} > /tmp/apt 2>&1 || {{ cat /tmp/apt; exit 1; }}", run])


def _try(session: Session, recipe: Recipe) -> Outcome:
    tree = BareTree(session.cache, session.progress, recipe)
    chroot = tree.chroot({PROJECT: "/lab/project"}, {"DEBIAN_FRONTEND": "noninteractive"}, network=True)
    argv = ["setpriv", "--pdeathsig", "KILL", *chroot.argv(["sh", "-ec", script((PROJECT / PAGE).read_text())])]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome(recipe, 1, f"longer than {seconds(LIMIT_S)}")
    return Outcome(recipe, done.returncode, done.stdout)


def run(session: Session, kernel: str, recipes: Sequence[Recipe] = BARE) -> int:
    """Run the tests on every tree; print what failed, and a line for each tree."""
    session.set_up(kernel, "soak")
    with session.cache.setting_up():
        for recipe in recipes:
            BareTree(session.cache, session.progress, recipe).ensure()
    with session.using(), ThreadPoolExecutor(max_workers=len(recipes)) as pool:
        outcomes = list(pool.map(lambda recipe: _try(session, recipe), recipes))
    for outcome in outcomes:
        if outcome.status:
            print(f"{outcome.said}\n")
    for outcome in outcomes:
        print(f"{outcome.recipe.title}: {outcome.last_line}", flush=True)
    return 1 if any(outcome.status for outcome in outcomes) else 0
