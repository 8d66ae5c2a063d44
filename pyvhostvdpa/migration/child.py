# SPDX-License-Identifier: MIT
"""The process for the destination of ``migrate``: it receives one guest, lets it run, and reports as JSON lines.

``python -m pyvhostvdpa.migration.child ORDER``, where ORDER is
:meth:`pyvhostvdpa.migration.order.Order.encode`'s JSON. Each line on standard output is an object with
one key: ``phase``, ``tell`` or ``log`` with words; in the end ``result`` with
the report as its schema ``pyvhostvdpa/receive/1`` has it, or ``error`` with
``message`` and ``hint``. Exit status: 0 with a result, 1 with an error.

The process that started it may be gone: lines that it cannot write are dropped.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ..base.closing import Closing
from ..base.errors import VhostVdpaError
from ..guest.synthetic import KINDS
from ..trace import records
from ..trace.recorder import Trace
from .common import words_of
from .endpoint import Inherited
from .later import Later
from .order import Order
from .session import Receiving


class Lines(Closing):
    """JSON lines on a descriptor; one that cannot be written is left out."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._later = Later()

    def write(self, kind: str, content: Any) -> None:
        """Write a line, in one piece: several threads may."""
        self._later.flush()
        self._write(kind, content)

    def write_later(self, kind: str, content: Any) -> None:
        """The same a moment later: no guest stays paused for it."""
        self._later(lambda: self._write(kind, content))

    def close(self) -> None:
        """Write what waits. Idempotent."""
        self._later.close()

    def _write(self, kind: str, content: Any) -> None:
        data = memoryview(json.dumps({kind: content}).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            # the reader is gone, and there is no other
            return


class _LogLines(logging.Handler):
    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.write("log", record.getMessage())


def main(argument: str) -> int:
    """Carry out an order and return the exit status."""
    # a group of its own keeps Ctrl-C away; what comes is the starter's word to end early, heard where that is possible
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Lines(sys.stdout.fileno()) as lines:
        logging.basicConfig(handlers=[_LogLines(lines)], level=logging.INFO)
        order = Order.decode(argument)
        trace = Trace(order.limit)
        try:
            lines.write("result", _receive(order, trace, lines))
            status = 0
        except Exception as e:
            lines.write("error", {"message": words_of(e), "hint": e.hint if isinstance(e, VhostVdpaError) else ""})
            status = 1
        _record(order, trace, lines)
    return status


def _receive(order: Order, trace: Trace, lines: Lines) -> dict[str, Any]:
    receiving = Receiving(
        order.paths,
        order.seconds,
        Path(order.folder),
        lambda phase: lines.write_later("phase", phase),
        lambda text: lines.write_later("tell", text),
        trace,
        order.control_deadline,
        order.drain,
        order.procedure,
        kinds=KINDS,
    )
    with Inherited(order.fd) as stream:
        return receiving.receive(stream).to_dict()


def _record(order: Order, trace: Trace, lines: Lines) -> None:
    if not order.records:
        return
    try:
        with open(order.records, "w", encoding="utf-8") as file:
            records.write(trace, file)
    except OSError as e:
        lines.write("log", f"what the destination recorded is missing from the trace: {words_of(e)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
