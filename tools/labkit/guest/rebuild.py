"""Build the extension module again, where few of its C files differ from an earlier build; runs in the lab's tree.

    rebuild.py fill|use KEPT TARGET

In the folder of a project. KEPT has each C file as it was, and the object made of it; a file that differs is compiled.
To fill it is to keep what is compiled. The flags are setuptools' own.
"""

import filecmp
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from setuptools import setup

GENERATED = Path("build/_cdefs.c")


def main(fill: bool, kept: Path, target: str) -> None:
    """Build into a folder."""
    # by the name under which setuptools imports its copy of distutils: by its place it is another module
    compiler = importlib.import_module("distutils.unixccompiler").UnixCCompiler
    compile_one: Callable[..., None] = compiler._compile

    def compile_or_copy(self: object, made: str, source: str, *others: object) -> None:
        known, known_object = kept / source, kept / f"{source}.o"
        if known_object.exists() and filecmp.cmp(known, source, shallow=False):
            shutil.copyfile(known_object, made)
            return
        compile_one(self, made, source, *others)
        if fill:
            known.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, known)
            shutil.copyfile(made, known_object)

    if fill:
        sys.path.insert(0, "cdefs")
        __import__("build").emit(GENERATED)
    else:
        GENERATED.parent.mkdir(exist_ok=True)
        shutil.copyfile(kept / GENERATED, GENERATED)
    with patch.object(compiler, "_compile", compile_or_copy):
        setup(script_args=["-q", "build_ext", "--build-lib", target, "--build-temp", "build/temp"])


if __name__ == "__main__":
    main(sys.argv[1] == "fill", Path(sys.argv[2]), sys.argv[3])
