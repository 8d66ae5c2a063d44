"""QEMU's user emulation, by which this machine runs programs of another architecture: fetched, never installed."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from labkit.bare import BareTree
from labkit.cache import Cache, building
from labkit.errors import LabError
from labkit.progress import Progress

PACKAGE = "qemu-user"
_FETCH = f"""cd /tmp && apt-get download {PACKAGE} && dpkg-deb --extract {PACKAGE}_*.deb all
cp all/usr/bin/qemu-aarch64 /lab/out"""
# A superblock that is mounted nowhere else goes with its mount, and what was registered with it; one of the host stays,
# so the entry is also taken back. The end of standard input is this process's end, whatever its cause.
_KEEP = """mount -t binfmt_misc lab "$1"
printf '%s' "$3" > "$1/register"
echo registered
cat > /dev/null
echo -1 > "$1/$2" """
_CONTAINED = ("unshare", "--mount", "--propagation", "private")
# elf(5): what a program of arm64 begins with, and which bits of it count: any ABI, a program or a shared object.
_ET_EXEC, _EM_AARCH64 = 2, 183
_MAGIC = b"\x7fELF\x02\x01\x01" + bytes(9) + _ET_EXEC.to_bytes(2, "little") + _EM_AARCH64.to_bytes(2, "little")
_MASK = b"\xff" * 7 + b"\x00" + b"\xff" * 8 + b"\xfe\xff\xff\xff"


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def rule(name: str, interpreter: Path) -> str:
    """Return the line that registers an interpreter of arm64's programs with binfmt_misc (Documentation/admin-guide).

    F opens the interpreter now, so that a chroot needs none; P hands on argv[0]; O and C hand on the file and its
    credentials.
    """
    return f":{name}:M::{_escaped(_MAGIC)}:{_escaped(_MASK)}:{interpreter}:OCPF"


class Emulator:
    """QEMU for programs of arm64, in the lab's cache, of the suite of a tree."""

    def __init__(self, cache: Cache, progress: Progress, tree: BareTree) -> None:
        self.cache = cache
        self.progress = progress
        self.tree = tree
        self.folder = tree.folder / "emulator"
        self.program = self.folder / "qemu-aarch64"

    def ensure(self) -> None:
        """Fetch it, unless it is there."""
        if self.program.exists():
            return
        with building(self.folder) as partial:
            chroot = self.tree.chroot({partial: "/lab/out"}, {}, network=True)
            log = self.cache.log("emulator")
            title = f"fetching Debian's {PACKAGE} (about 71 MB)"
            self.progress.call(title, chroot.argv(["sh", "-ec", _FETCH]), log)

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """Have this machine's kernel start arm64's programs with it, until the end; LabError if it refuses."""
        name = f"pyvhostvdpa-{os.getpid()}"
        self.progress.say("this machine's kernel starts programs of arm64 with QEMU (binfmt_misc) until this is done")
        argv = [*_CONTAINED, "sh", "-ec", _KEEP, "sh"]
        argv += [str(self.cache.mount_point), name, rule(name, self.program)]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as keeper:
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            assert keeper.stderr is not None
            try:
                if keeper.stdout.readline() != b"registered\n":
                    said = keeper.stderr.read().decode(errors="replace").strip()
                    raise LabError(
                        "the kernel does not start programs of another architecture",
                        f"binfmt_misc: {said}",
                        "modprobe binfmt_misc",
                    )
                yield
            finally:
                keeper.stdin.close()
                keeper.wait()
