"""The extended state of this machine's processor: its size, and help for kernels that know a smaller one."""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from labkit.progress import Progress
from labkit.tree import Tree

SOURCE = Path(__file__).with_name("guest") / "xstate.c"
LIBRARY = "xstate.so"
KNOWN_BYTES = 2696
"""What User Mode Linux keeps of it before 6.13. A processor with AMX has more."""
LARGEST = 1 << 16
PTRACE_ATTACH, PTRACE_DETACH, PTRACE_GETREGSET = 16, 17, 0x4204
NT_X86_XSTATE = 0x202


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def size() -> int:
    """Return the bytes of this machine's extended state, as the kernel hands it to a tracer; 0 if it does not."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as child:
        try:
            return _size_of(child.pid)
        finally:
            child.kill()


def _size_of(pid: int) -> int:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.restype = ctypes.c_long
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if ptrace(PTRACE_ATTACH, pid, None, None) < 0:
        return 0
    os.waitpid(pid, 0)
    buffer = ctypes.create_string_buffer(LARGEST)
    vector = _Vector(ctypes.addressof(buffer), LARGEST)
    answer = ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, ctypes.addressof(vector))
    ptrace(PTRACE_DETACH, pid, None, None)
    return 0 if answer < 0 else vector.length


def variables(tree: Tree, progress: Progress, folder: Path, inside: str) -> Mapping[str, str]:
    """Return the variables that User Mode Linux needs; what it preloads is built in `folder` (`inside` the tree)."""
    have = size()
    if have <= KNOWN_BYTES:
        return {}
    progress.say(
        f"this processor's extended state has {have} bytes, more than {KNOWN_BYTES}: a library helps the kernel"
    )
    (folder / SOURCE.name).write_bytes(SOURCE.read_bytes())
    argv = ["sh", "-ec", build_command(inside, f"{inside}/{SOURCE.name}")]
    chroot = tree.chroot(binds={folder: inside})
    progress.call("building that library", chroot.argv(argv), tree.cache.log("debug-xstate"))
    return {"LD_PRELOAD": f"{inside}/{LIBRARY}"}


def build_command(folder: str, source: str) -> str:
    """Return a line of shell that builds the library in a folder; both paths as they are in the tree."""
    return shlex.join(["gcc", "-O2", "-shared", "-fPIC", "-o", f"{folder}/{LIBRARY}", source])
