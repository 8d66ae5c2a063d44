"""`tools/lab ladder`: `vhost-vdpa ladder` in a VM with virtual time and vdpa_hwsim, its options passed on."""

import re
from collections.abc import Sequence
from pathlib import Path

from labkit import values
from labkit.errors import LabError
from labkit.session import Request

DEVICES = ("vdpa_hwsim:0",)
GUEST_MEMORY = 1 << 30
ROOM = 3 << 29
"""What the VM has beside the guest memory of the ladder."""
NOT_HERE = ("--devices", "--cpus", "--accel", "--icount", "--env")
"""Options of `tools/lab run`, which are none of `vhost-vdpa ladder`."""
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def request(given: Sequence[str], kernel: str, timeout: float | None) -> Request:
    """Return the VM for a ladder with these options."""
    command, shares = ["vhost-vdpa", "ladder", *given], []
    _refuse_options_of_run(given)
    report = value(given, "--report")
    if report is not None:
        folder = Path(report).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(
                f"--report {report}: this folder cannot be made", str(error), "--report a folder that is new"
            ) from error
        shares.append(folder)
        command = [str(folder) if word == report else word.replace(f"={report}", f"={folder}") for word in command]
    need = memory(value(given, "--memory")) + ROOM
    values.check_memory(need, "--memory: guest memory and what the VM has beside it")
    return Request(
        command=command,
        kernel=kernel,
        devices=DEVICES,
        memory=f"{-(-need // (1 << 20))}M",
        icount=True,
        timeout=timeout,
        shares=shares,
    )


def _refuse_options_of_run(given: Sequence[str]) -> None:
    for word in given:
        option = word.partition("=")[0]
        if option in NOT_HERE:
            raise LabError(
                f"ladder takes no {option}",
                "It has a VM of its own: one CPU, virtual time, as much memory as its guest needs.",
                "tools/lab run -- vhost-vdpa ladder --help",
            )


def value(given: Sequence[str], option: str) -> str | None:
    """Return an option's value, as `--option VALUE` or `--option=VALUE`."""
    for index, word in enumerate(given):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and index + 1 < len(given):
            return given[index + 1]
    return None


def memory(text: str | None) -> int:
    """Read a size; one that makes no sense is left to the command to refuse."""
    found = re.fullmatch(r"(\d+)([kmg]?)(i?b)?", (text or "").lower())
    return int(found[1]) * _UNITS[found[2]] if found else GUEST_MEMORY
