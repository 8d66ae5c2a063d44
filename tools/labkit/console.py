"""The user's terminal, connected to the console of a VM."""

import contextlib
import os
import selectors
import shutil
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator


def shell_command() -> list[str]:
    """Return what runs on the VM's console: a shell that knows the terminal's size."""
    columns, lines = shutil.get_terminal_size()
    script = f"stty rows {lines} cols {columns} 2>/dev/null; exec bash -i"
    return ["setsid", "-c", "sh", "-c", script]


@contextlib.contextmanager
def attached(end: socket.socket, selector: selectors.BaseSelector) -> Iterator[Callable[[object], None]]:
    """Switch the terminal to raw mode meanwhile; yield a function that moves bytes on the selector's events."""
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)

    def pump(where: object) -> None:
        if where == "keys":
            data = os.read(source, 4096)
            if data:
                end.sendall(data)
            else:
                selector.unregister(source)
        else:
            data = end.recv(1 << 16)
            if data:
                os.write(sys.stdout.fileno(), data)
            else:
                selector.unregister(end)

    selector.register(source, selectors.EVENT_READ, "keys")
    selector.register(end, selectors.EVENT_READ, "screen")
    tty.setraw(source)
    try:
        yield pump
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
