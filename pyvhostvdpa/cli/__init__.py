# SPDX-License-Identifier: MIT
"""``vhost-vdpa``: one module per sub-command, each parses, calls and prints.

Exit status: 0 done, 1 an error that was explained, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

from . import failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status.

    Everything that a user can meet ends here as a sentence and a status:
    also Ctrl-C, a lack of memory or of descriptors while modules are still
    being loaded. Wrong usage raises SystemExit, as argparse does.
    """
    with failure.Streams() as streams:
        try:
            streams.check()
            from .commands import run  # noqa: PLC0415

            status = run(arguments)
        except SystemExit as e:
            if not e.code and streams.finish(0):
                return failure.FAILED
            raise
        except BaseException as e:
            if streams.lost(e):
                status = failure.FAILED
            else:
                told = failure.explain(e)
                if told is None:
                    raise
                status = told
        return streams.finish(status)
