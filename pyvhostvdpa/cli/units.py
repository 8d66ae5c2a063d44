# SPDX-License-Identifier: MIT
"""Sizes, times and counts as people type them."""

from __future__ import annotations

import argparse

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(text: str) -> int:
    """Parse ``512M``, ``1G``, ``2GiB``, ``4096`` (bytes)."""
    lowered = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = lowered[-1:] if lowered[-1:] in _UNITS else ""
    try:
        value = float(lowered.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (try 512M or 1G)") from None
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"not a size in whole bytes: {text!r}")
    return int(value)


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
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a number of at least 1: {text!r}")
    return int(text)
