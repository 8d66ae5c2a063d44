"""The programs of tests/native: how each is built, here or for a machine that has no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
TARGETS = {
    "svq_fuzz": ("svq", "svq_handover", "svq_regions", "used_relay", "ring", "memory"),
    "ctrl_fuzz": ("ctrl", "memory"),
    "pages_fuzz": ("pages_send", "pages_receive", "sum", "memory"),
    "relay_bench": ("svq", "used_relay", "memory"),
    "log_race": ("svq", "used_relay", "ctrl", "memory"),
}
"""Programs, and the sources of the package that each is built with."""
SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACING = ("-O0", "-pthread")
BUILT = "PYVHOSTVDPA_NATIVE"
"""Names a folder with programs that a cross compiler built, for a machine without a compiler."""


def build(folder: Path, name: str, *flags: str) -> Path:
    """Build one program with the compiler that CC names."""
    program = folder / name
    sources = [NATIVE / f"{name}.c", *(ROOT / "cdefs" / f"{source}.c" for source in TARGETS[name])]
    includes = [f"-I{ROOT / 'cdefs'}", f"-I{NATIVE}"]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-std=gnu11", "-Wall", "-Wextra", *flags, *includes, *sources, "-o", program], check=True)
    return program


if __name__ == "__main__":
    for fuzz in ("svq_fuzz", "ctrl_fuzz", "pages_fuzz"):
        build(Path(sys.argv[1]), fuzz, *SANITIZED, *sys.argv[2:])
    build(Path(sys.argv[1]), "log_race", *RACING)
