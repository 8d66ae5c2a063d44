# SPDX-License-Identifier: MIT
"""Sizes, times and counts as people type them."""

from __future__ import annotations

import argparse

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LARGEST = (1 << 63) - 1
"""What the kernel can be asked for: a signed number of 64 bits."""
_INFINITE = float("inf")
_MOST = 1_000_000_000
_LEAST_MEMORY = 1 << 20
_LEAST_RATE = 64 << 10
"""Below this the other side of a stream takes it for dead before a page has passed."""

SIZES = "sizes: bytes, or with K, M, G, T (powers of 1024): 512M, 64Mi, 1.5GiB"
"""For the help of commands that take sizes."""


def size(text: str) -> int:
    """Parse ``512M``, ``64Mi``, ``1G``, ``2GiB``, ``4096`` (bytes)."""
    lowered = text.strip().lower().removesuffix("b")
    if lowered[-2:-1].isalpha():
        lowered = lowered.removesuffix("i")
    unit = lowered[-1:] if lowered[-1:] in _UNITS else ""
    try:
        value = float(lowered.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (try 512M or 1G)") from None
    # also what is not a number
    if not -_INFINITE < value <= _LARGEST:
        raise argparse.ArgumentTypeError(f"not a size that a machine can have: {text!r} (try 512M or 1G)")
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"not a size in whole bytes: {text!r}")
    return int(value)


def guest_memory(text: str) -> int:
    """Parse a size of guest memory: at least a MiB, since a number without a unit is bytes."""
    return _at_least(text, _LEAST_MEMORY, "guest memory of {} bytes holds no rings and frames")


def stream_rate(text: str) -> int:
    """Parse bytes per second on a stream: so many that a page passes before the other side loses patience."""
    return _at_least(
        text, _LEAST_RATE, "at {} bytes per second the other side closes the stream before a page has passed"
    )


def _at_least(text: str, least: int, why: str) -> int:
    value = size(text)
    if value >= least:
        return value
    number = text.strip()
    meant = f"did you mean {number}M?" if number.isdecimal() else f"at least {least >> 10}K"
    raise argparse.ArgumentTypeError(f"{text!r}: {why.format(value)} ({meant})")


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}") from None
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"not a usable number of seconds: {text!r}")
    return value


def count(text: str) -> int:
    """Parse a number of things, at least one."""
    # as many digits as int() takes
    if not text.isdecimal() or not text.isascii() or len(text) > len(str(_MOST)) or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {_MOST:,}: {text!r}")
    return int(text)
