"""What a kernel says in its log when it found something wrong with itself."""

import re
from collections.abc import Iterable, Sequence

PANIC = "Kernel panic - not syncing"
REPORT = re.compile(
    r"\bBUG:|\bKASAN\b.*\bin\b|WARNING:|\bOops\b|general protection|kernel NULL pointer|Unable to handle kernel"
    r"|possible (recursive|circular|irq lock|deadlock)|inconsistent lock state|INFO: (task|trying|rcu|lockdep)"
    r"|suspicious RCU usage|lock held when returning|bad unlock balance|turning off the locking correctness"
    r"|refcount_t:|ODEBUG:|Bad page|list_(add|del) corruption|scheduling while atomic|sleeping function"
    r"|leak detector disabled|soft lockup|blocked for more than|Kernel panic|Modules linked in|unreferenced object"
)


def reports(lines: Iterable[str]) -> list[str]:
    """Return the lines of a kernel's log by which it reports an error of its own."""
    return [line.rstrip() for line in lines if REPORT.search(line)]


def end(lines: Sequence[str], shown: int, shown_of_panic: int) -> Sequence[str]:
    """Return the last lines of a kernel's log; of one that panicked, those from the report that led to it on."""
    panic = next((number for number, line in enumerate(lines) if PANIC in line), None)
    if panic is None:
        return lines[max(0, len(lines) - shown) :]
    begin = max(0, panic + 1 - shown_of_panic)
    first = next(number for number in range(begin, panic + 1) if REPORT.search(lines[number]))
    # of some panics the trace comes behind it
    return lines[first : panic + 1 + shown]
