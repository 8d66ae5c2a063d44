# SPDX-License-Identifier: MIT
"""Doing the same to several devices at once, a thread each: while a guest stands still none waits for another.

The kernel serializes the calls of one device only, and calls are made without
the GIL, so that what devices take is taken side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def together(actions: Sequence[Callable[[], None]]) -> None:
    """Run each action in a thread of its own, and wait for all.

    An error of one keeps no other from its end; the first, in the order of
    ``actions``, is raised, the others are its notes.
    """
    if len(actions) == 1:
        actions[0]()
        return
    errors: list[BaseException | None] = [None] * len(actions)

    def act(number: int) -> None:
        try:
            actions[number]()
        except BaseException as e:
            errors[number] = e

    threads = [
        threading.Thread(target=act, args=(number,), name=f"device-{number}", daemon=True)
        for number in range(len(actions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [error for error in errors if error is not None]
    if found:
        for other in found[1:]:
            found[0].add_note(f"also: {other}")
        raise found[0]
