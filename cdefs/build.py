# SPDX-License-Identifier: MIT
"""The cffi description of :mod:`pyvhostvdpa._cdefs`.

The headers beside this file are read twice: by the compiler, and, without
their preprocessor lines other than plain integer constants, by cffi. So a
declaration stands in one place, and the compiler checks every layout.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = (
    "vhost_types.h",
    "vhost.h",
    "virtio_ring.h",
    "virtio_net.h",
    "ring.h",
    "memory.h",
    "lost_memory.h",
    "svq.h",
    "ctrl.h",
    "nic.h",
    "pages.h",
    "bench.h",
    "calls.h",
    "handover.h",
    "guest_rest.h",
    "trial.h",
)

_CONSTANT = re.compile(r"#define\s+\w+\s+\d+\b")


def declarations() -> str:
    """Return the headers' text in the subset of C that cffi parses."""
    lines = []
    for name in HEADERS:
        for line in (HERE / name).read_text().splitlines():
            if line.startswith("#"):
                constant = _CONSTANT.match(line)
                if not constant:
                    continue
                lines.append(constant.group())
            else:
                lines.append(line)
    return "\n".join(lines)


def emit(target: Path) -> None:
    """Write the C source of the extension module to ``target``."""
    builder = FFI()
    builder.cdef(declarations())
    builder.set_source("pyvhostvdpa._cdefs", '#include "cdefs.h"')
    target.parent.mkdir(parents=True, exist_ok=True)
    builder.emit_c_code(str(target))
