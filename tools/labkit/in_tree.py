"""Running what needs no device and no VM: in the lab's tree, with the installed project, on this machine's kernel."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit import vm
from labkit.environment import INSIDE
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.session import PROJECT, Session


def run(
    session: Session,
    argv: Sequence[str],
    limit: float | None,
    next_step: str,
    environment: Mapping[str, str] = {},
    binds: Mapping[Path, str] = {},
) -> int:
    """Run a command and return its exit status; LabError if it takes longer than `limit` seconds, if that is given."""
    mounts = {PROJECT: str(PROJECT), **binds}
    if session.environment.ready:
        mounts[session.environment.site] = INSIDE
    chroot = session.tree.chroot(
        binds=mounts, environment={**vm.default_environment(), **environment}, folder=str(PROJECT)
    )
    sys.stdout.flush()
    command = ["setpriv", "--pdeathsig", "KILL", *chroot.argv(argv)]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired as error:
        raise LabError(
            f"time-out: {argv[0]} ran longer than {limit:g} s and was stopped",
            "its last words are above; a process does not end before its last thread",
            next_step,
            EXIT_TIMEOUT,
        ) from error
