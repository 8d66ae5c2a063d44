"""`tools/lab ladder`: `vhost-vdpa ladder` in a VM with virtual time and vdpa_hwsim, its options passed on."""

import re
from collections.abc import Sequence
from pathlib import Path

from labkit import values
from labkit.errors import LabError
from labkit.session import PROJECT, Request

DEVICES = ("vdpa_hwsim:0",)
GUEST_MEMORY = 1 << 30
ROOM = 3 << 29
"""What the VM has beside the guest memory of the ladder."""
NOT_HERE = ("--cpus", "--accel", "--icount", "--env")
"""Options of `tools/lab run` that `vhost-vdpa ladder` does not have."""
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def request(given: Sequence[str], kernel: str, timeout: float | None) -> Request:
    """Return the VM for a ladder with these options."""
    command, shares = ["vhost-vdpa", "ladder", *_with_recordings(given)], []
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
    # the ladder's own --devices is a number of devices, that of `tools/lab run` names a kind
    kind = ":" in (value(given, "--devices") or "")
    for word in given:
        option = word.partition("=")[0]
        if option in NOT_HERE or (kind and option == "--devices"):
            raise LabError(
                f"ladder takes no {option}",
                "It has a VM of its own: one CPU, virtual time, as much memory as its guest needs.",
                "tools/lab run -- vhost-vdpa ladder --help",
            )


def _with_recordings(given: Sequence[str]) -> list[str]:
    """Return the words with the paths of recordings as the VM has them: it has this folder and nothing else."""
    words, inside = [], False
    for word in given:
        if word.startswith("--with="):
            words.append("--with=" + _recording(word.removeprefix("--with=")))
        elif word.startswith("-"):
            words.append(word)
        else:
            words.append(_recording(word) if inside else word)
        inside = word.partition("=")[0] == "--with" or (inside and not word.startswith("-"))
    return words


def _recording(word: str) -> str:
    title, mark, name = word.rpartition("=")
    path = Path(name).resolve()
    if not path.is_file():
        raise LabError(f"--with {name}: there is no such file", "", "vhost-vdpa watch --trace FILE.jsonl writes one")
    if not path.is_relative_to(PROJECT):
        raise LabError(f"--with {name}: the VM has no files but those in {PROJECT}", "", f"cp {name} {PROJECT}/build/")
    return f"{title}{mark}{path}"


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
