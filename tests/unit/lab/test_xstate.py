"""The extended state of the processor: its size, and the library for tracers that know less of it than there is.

A tracer that keeps fewer bytes than this machine has stands for User Mode Linux on a machine with AMX: the kernel
refuses both for the same reason. It keeps the 512 of FXSAVE, which is less than any processor with XSAVE has.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from labkit import xstate

TRACER = r"""
#include <elf.h>
#include <stdio.h>
#include <string.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static const char pattern[16] = "fifteen letters";

int main(void)
{
    static char state[512];
    struct iovec part = {state, sizeof state};
    char seen[16] = "";
    int status, pid = fork();

    if (!pid) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        __asm__ volatile("movdqu %0, %%xmm7; int3; movdqu %%xmm7, %1" : : "m"(pattern), "m"(seen) : "xmm7", "memory");
        _exit(strncmp(seen, "another pattern", 15) != 0);
    }
    waitpid(pid, &status, 0);
    if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &part) || memcmp(state + 160 + 7 * 16, pattern, 16))
        return 2;
    printf("%zu\n", part.iov_len);
    memcpy(state + 160 + 7 * 16, "another pattern", 16);
    if (ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &part))
        return perror("PTRACE_SETREGSET"), 3;
    ptrace(PTRACE_CONT, pid, 0, 0);
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 4;
}
"""

needs_tracer = pytest.mark.skipif(
    shutil.which("gcc") is None or os.uname().machine != "x86_64", reason="needs a compiler and an x86_64 processor"
)


@pytest.fixture
def tracer(tmp_path: Path) -> Path:
    (tmp_path / "tracer.c").write_text(TRACER)
    subprocess.run(["gcc", "-O1", "-o", tmp_path / "tracer", tmp_path / "tracer.c"], check=True)
    return tmp_path / "tracer"


@needs_tracer
def test_tracer_with_a_small_buffer_is_refused_by_the_kernel(tracer):
    done = subprocess.run([tracer], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "Bad address" in done.stderr


@needs_tracer
def test_library_gives_a_tracer_with_a_small_buffer_the_registers_it_knows(tracer, tmp_path):
    library = tmp_path / xstate.LIBRARY
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", "-O2", *warnings, "-shared", "-fPIC", "-o", library, xstate.SOURCE], check=True)
    preloaded = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([tracer], capture_output=True, text=True, check=False, env=preloaded)
    assert (done.returncode, done.stdout, done.stderr) == (0, "512\n", "")


class Progress:
    def __init__(self):
        self.said, self.called = [], []

    def say(self, text):
        self.said.append(text)

    def call(self, title, argv, log):
        self.called.append(argv)


class Tree:
    class Cache:
        @staticmethod
        def log(name):
            return Path(name)

    class Chroot:
        @staticmethod
        def argv(words):
            return words

    cache = Cache

    def chroot(self, binds):
        return self.Chroot


@pytest.mark.parametrize("more", [0, 1])
def test_library_is_preloaded_where_the_state_is_larger_than_the_kernel_knows(tmp_path, monkeypatch, more):
    monkeypatch.setattr(xstate, "size", lambda: xstate.KNOWN_BYTES + more)
    progress = Progress()
    found = xstate.variables(Tree(), progress, tmp_path, "/lab/run")
    assert found == ({"LD_PRELOAD": "/lab/run/xstate.so"} if more else {})
    assert len(progress.said) == len(progress.called) == more
