# SPDX-License-Identifier: MIT
"""Memory that a device may reach: allocated here, its pages, pinning, and IOVA allocation."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .guest import DEFAULT_GPA, FileRegion, GuestMemory
    from .log import SharedLog
    from .mapped import FileMemory, SharedMemory
else:

    def __getattr__(name):
        # limits and page sizes are asked for by commands that have no guest: they need not load the C library
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import guest, log  # noqa: PLC0415

        return getattr(log if name == "SharedLog" else guest, name)


__all__ = ["DEFAULT_GPA", "FileMemory", "FileRegion", "GuestMemory", "SharedLog", "SharedMemory"]
