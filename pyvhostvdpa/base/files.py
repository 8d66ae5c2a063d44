# SPDX-License-Identifier: MIT
"""Files that a command writes: checked in advance, and replaced in one step, so that a failure leaves the old one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that writing a file would end with, if it can be foreseen; changes nothing."""
    text = os.fspath(path)
    if os.path.isdir(text):
        raise _error(errno.EISDIR, text)
    if os.path.exists(text):
        if not os.access(text, os.W_OK):
            raise _error(errno.EACCES, text)
        return
    folder = os.path.dirname(os.path.realpath(text))
    _check_folder(folder, text)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that making a folder, or a file in it, would end with; changes nothing."""
    text = os.path.abspath(path)
    while not os.path.lexists(text) and os.path.dirname(text) != text:
        text = os.path.dirname(text)
    _check_folder(text, os.fspath(path))


def _check_folder(folder: str, wanted: str) -> None:
    if not os.path.exists(folder):
        raise _error(errno.ENOENT, wanted)
    if not os.path.isdir(folder):
        raise _error(errno.ENOTDIR, wanted)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _error(errno.EACCES, wanted)


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def replace_file(path: str | os.PathLike[str], write: Callable[[Any], object], binary: bool = False) -> None:
    """Write a file whole or not at all: ``write`` gets it open, text as UTF-8.

    A device or a pipe is written to as it is. Raises OSError with the file's
    name, and what ``write`` raises; what was there before is left then.
    """
    text = os.fspath(path)
    try:
        _replace(os.path.realpath(text), write, binary)
    except OSError as e:
        # an error of write() names no file; one of the temporary file names that
        e.filename = text
        raise


def _replace(target: str, write: Callable[[Any], object], binary: bool) -> None:
    mode, encoding = ("wb", None) if binary else ("w", "utf-8")
    try:
        old: os.stat_result | None = os.stat(target)
    except FileNotFoundError:
        old = None
    special = old is not None and not stat.S_ISREG(old.st_mode)
    if special or (old is not None and not os.access(os.path.dirname(target), os.W_OK)):
        with open(target, mode, encoding=encoding) as file:
            write(file)
        return
    temporary = f"{target}.{os.getpid()}.part"
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            if old is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            write(file)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
