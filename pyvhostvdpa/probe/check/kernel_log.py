# SPDX-License-Identifier: MIT
"""The kernel's log while a rule runs: an oops, a BUG or a WARN in it is a fault, whatever the device answered."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ...base.eventfds import close_all

PATH = "/dev/kmsg"
_RECORD = 8192
"""More than a record has (kernel/printk/printk.c: PRINTK_MESSAGE_MAX)."""
_FAULT = re.compile(
    r"\bBUG:|\bkernel BUG at|\bOops\b|\bWARNING:|\bKASAN\b|\bKCSAN\b|UBSAN:|general protection fault|"
    r"unable to handle|refcount_t:|list_(?:add|del) corruption|blocked for more than|soft lockup|"
    r"scheduling while atomic|bad: scheduling|possible (?:circular|recursive) locking|DEBUG_LOCKS_WARN"
)


def faults(lines: Iterable[str]) -> list[str]:
    """Return the lines that report a fault of the kernel."""
    return [line for line in lines if _FAULT.search(line)]


def text_of(record: str) -> str:
    """Return a record of ``/dev/kmsg`` without its prefix (Documentation/ABI/testing/dev-kmsg)."""
    return record.partition("\n")[0].partition(";")[2]


class KernelLog:
    """The log from now on. ``why`` is the reason if it cannot be read, "" if it can."""

    def __init__(self, path: str = PATH) -> None:
        self.why = ""
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as e:
            self.close()
            self.why = f"{path}: {e.strerror}"

    def lines(self) -> list[str]:
        """Return what was logged since the last time."""
        found: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD)
            except BlockingIOError:
                break
            except BrokenPipeError:
                # records were overwritten before they were read: the next read continues behind them
                continue
            except OSError as e:
                self.why = f"{PATH}: {e.strerror}"
                break
            if not record:
                break
            found.append(text_of(record.decode(errors="replace")))
        return found

    def close(self) -> None:
        """Stop reading."""
        fd, self._fd = self._fd, -1
        close_all([fd])
