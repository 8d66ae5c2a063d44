"""Two VMs with a network between them: a is 10.77.0.1, b is 10.77.0.2."""

import selectors
import socket
from collections.abc import Sequence
from dataclasses import replace

from labkit import output, values, vm
from labkit.errors import LabError
from labkit.session import Request, Session

SEPARATOR = "---"
NAMES = ("a", "b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
MACS = ("52:54:91:0d:4d:01", "52:54:91:0d:4d:02")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the two commands of `COMMAND_A --- COMMAND_B`."""
    if words.count(SEPARATOR) == 1:
        middle = list(words).index(SEPARATOR)
        first, second = list(words[:middle]), list(words[middle + 1 :])
        if first and second:
            return first, second
    raise LabError(
        f"pair needs two commands with {SEPARATOR} between them",
        "",
        f"tools/lab pair -- ping -c 3 b {SEPARATOR} ip address",
    )


def run(session: Session, request: Request, words: Sequence[str]) -> int:
    """Run one command in each of two VMs; return the first exit status that is not 0."""
    commands = split(words)
    values.check_memory(2 * values.memory(request.memory), f"two VMs with --memory {request.memory} each")
    chosen = session.set_up(request.kernel, "pair")
    with session.using(), selectors.DefaultSelector() as selector:
        mode = session.mode(request, chosen)
        wires = socket.socketpair()
        sinks = [[output.Prefixed(f"{name}| ", output.writer(number)) for number in (1, 2)] for name in NAMES]
        specs = [
            replace(
                session.spec(replace(request, command=commands[side]), chosen, mode, NAMES[side]),
                network=(wires[side], ADDRESSES[side], MACS[side]),
            )
            for side in (0, 1)
        ]
        with vm.Machine(specs[0], *sinks[0]) as first, vm.Machine(specs[1], *sinks[1]) as second:
            vm.drive([first, second], selector, lambda _: None)
            statuses = (first.status, second.status)
        for sink in (*sinks[0], *sinks[1]):
            sink.flush()
    session.progress.say(", ".join(f"{name} ended with {status}" for name, status in zip(NAMES, statuses, strict=True)))
    return next((status for status in statuses if status), 0)
