# SPDX-License-Identifier: MIT
"""In-tree build backend: setuptools, after the cffi module has been written.

``[[tool.setuptools.ext-modules]]`` wants a C file that exists, so each hook
that builds writes ``build/_cdefs.c`` first. Nothing else differs from
:mod:`setuptools.build_meta`.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build import emit

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_ConfigSettings = dict[str, str | list[str] | None] | None

_GENERATED = Path("build") / "_cdefs.c"
_MANIFEST = Path("MANIFEST.in")
_CONTENTS = """\
graft .ci
graft .github
graft cdefs
graft pyvhostvdpa
graft tests
graft tools
include .gitignore
prune build
global-exclude *.py[co] *.so *.o
"""


def build_wheel(
    wheel_directory: str, config_settings: _ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel (PEP 517)."""
    emit(_GENERATED)
    return str(_setuptools.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: _ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Build the editable wheel (PEP 660)."""
    emit(_GENERATED)
    return str(_setuptools.build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: _ConfigSettings = None) -> str:
    """Build the source distribution (PEP 517): all of the project, tests, lab and packaging included."""
    emit(_GENERATED)
    here = not _MANIFEST.exists()
    if here:
        _MANIFEST.write_text(_CONTENTS)
    try:
        return str(_setuptools.build_sdist(sdist_directory, config_settings))
    finally:
        if here:
            _MANIFEST.unlink()
