# SPDX-License-Identifier: MIT
"""Doing the same to several devices at once, a thread each: while a guest is paused none waits for another.

The kernel serializes the calls of one device only, and calls are made without
the GIL, so that what devices take is taken side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial


def together(actions: Sequence[Callable[[], None]], at_most: int | None = None) -> None:
    """Run each action in a thread of its own, and wait for all; ``at_most`` threads, if that is given.

    An error of one keeps no other from its end; the first, in the order of
    ``actions``, is raised, the others are its notes.
    """
    errors: list[BaseException | None] = [None] * len(actions)
    shares = min(len(actions), at_most or len(actions))

    def act(first: int) -> None:
        for number in range(first, len(actions), shares):
            try:
                actions[number]()
            except BaseException as e:
                errors[number] = e

    if shares == 1:
        act(0)
    else:
        _in_threads([partial(act, first) for first in range(shares)])
    found = [error for error in errors if error is not None]
    if found:
        for other in found[1:]:
            found[0].add_note(f"also: {other}")
        raise found[0]


def _in_threads(actions: Sequence[Callable[[], None]]) -> None:
    threads = [
        threading.Thread(target=action, name=f"device-{number}", daemon=True) for number, action in enumerate(actions)
    ]
    started = []
    for thread, action in zip(threads, actions, strict=True):
        try:
            thread.start()
        except RuntimeError:
            # no thread available: one after the other is slower, but still stops or starts every device
            action()
        else:
            started.append(thread)
    for thread in started:
        thread.join()
