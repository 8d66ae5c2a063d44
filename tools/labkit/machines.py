"""`tools/lab vm`: virtual machines that move, in a VM of the lab; see tools/labvm."""

from collections.abc import Sequence
from pathlib import Path

from labkit import ladder
from labkit.environment import INSIDE
from labkit.errors import LabError
from labkit.session import PROJECT, Request
from labvm.__main__ import parser

DEVICES = ("vdpa_sim_net:0", "vdpa_hwsim:0")
MEMORY = "3G"
NOT_HERE = ("--devices", "--cpus", "--accel", "--env", "--memory")
"""Options of `tools/lab run`; this VM is made for its purpose."""


def variables() -> dict[str, str]:
    """Return the variables by which Python in the VM finds what drives the machines."""
    return {"PYTHONPATH": f"{INSIDE}:{PROJECT / 'tools'}"}


def options() -> str:
    """Return the help of the options that go to the program in the VM."""
    return parser().format_help().partition("options:\n")[2]


def request(given: Sequence[str], kernel: str, icount: bool, timeout: float | None) -> Request:
    """Return the VM for a move with these options."""
    for word in given:
        if word.partition("=")[0] in NOT_HERE:
            raise LabError(f"vm takes no {word.partition('=')[0]}", "Its VM has what it needs.", "tools/lab vm --help")
    # wrong ones are refused here, before a VM boots for them
    parser().parse_args(given)
    command, shares = ["python3", "-m", "labvm", *given], []
    # by a clock that other programs hold up, two back-ends cannot be compared
    icount = icount or "--compare" in given
    folder = ladder.value(given, "--keep")
    if folder is not None:
        path = Path(folder).resolve()
        path.mkdir(parents=True, exist_ok=True)
        shares.append(path)
        command = [str(path) if word == folder else word.replace(f"={folder}", f"={path}") for word in command]
    return Request(
        command=command,
        kernel=kernel,
        devices=DEVICES,
        memory=MEMORY,
        icount=icount,
        timeout=timeout,
        shares=shares,
        environment=variables(),
        vmm=True,
    )
