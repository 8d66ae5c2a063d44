"""What a run with virtual machines needs beside the tree: a newer stock QEMU, a guest for it to run, User Mode Linux.

In the VM it is below /opt/vmm: `bin/qemu-VERSION` for each QEMU (the tree's own, and that of backports), `guest/` with
a kernel, its initial RAM file system, the program at the other end of the wire and a library that logs ioctls, `uml/`
with a kernel that is a process, and its modules.
"""

import hashlib
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from labkit.cache import building, forget_old, hold, once, remove
from labkit.errors import LabError
from labkit.guest_kernel import WANTED, GuestKernel, GuestKernelBuilder
from labkit.images import Cpio, make_image
from labkit.kernel import Builder
from labkit.tree import SUITE
from labkit.uml_image import UmlImage

INSIDE = "/opt/vmm"
BACKPORTS = f"{SUITE}-backports"
PACKAGE = "qemu-system-x86"
SOURCES = "tools/labvm"
# Of QEMU's data: firmware of other architectures and key maps of displays, which are not used here.
LEFT_OUT = ("keymaps", "*-firmware*", "openbios*", "skiboot*", "slof*", "s390*", "u-boot*", "palcode*", "*.dtb")
KEPT = 2
PROGRAMS = {
    "guest.c": ("init", ("-static", "-s")),
    "peer.c": ("vm-peer", ("-static", "-s")),
    "calls.c": ("calls.so", ("-shared", "-fPIC")),
}
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Vmm:
    """The images of a run with virtual machines, and where they are mounted."""

    qemu: Path
    guest: Path
    uml: Path

    def mounts(self) -> dict[str, Path]:
        """Return images by the folder that they are mounted on."""
        return {f"{INSIDE}/qemu": self.qemu, f"{INSIDE}/guest": self.guest, f"{INSIDE}/uml": self.uml}


class VmmBuilder:
    """Makes the images; what is there is used."""

    def __init__(self, stock: Builder, project: Path) -> None:
        self.stock = stock
        self.cache, self.tree, self.progress = stock.cache, stock.tree, stock.progress
        self.sources = project / SOURCES
        # Deeper than where a set-up looks for leftovers: these builds have a lock of their own.
        self.root = self.cache.root / "vmm"

    def ensure(self) -> Vmm:
        """Return the images; make what is missing, which takes minutes the first time."""
        with self.cache.building_vmm():
            return Vmm(self._qemu(), self._guest(), UmlImage(self.stock, self.root / "uml").ensure(WANTED))

    def _qemu(self) -> Path:
        recipe = repr((self.tree.identity(), PACKAGE, BACKPORTS, LEFT_OUT))
        target = self.root / "qemu" / hashlib.sha256(recipe.encode()).hexdigest()[:12]
        if not target.exists():
            with building(target, goes_on=True) as partial:
                once(partial, "fetch", lambda: self._fetch_qemu(partial / "debs"))
                self._unpack_qemu(partial)
                make_image(self.cache, self.progress, partial / "root", partial / "image", "writing QEMU's image")
                remove(partial / "debs")
                remove(partial / "root")
            hold(target)
            forget_old(target.parent, KEPT)
        return hold(target) / "image"

    def _fetch_qemu(self, debs: Path) -> None:
        remove(debs)
        debs.mkdir()
        if not self.cache.lists.is_dir() or not any(self.cache.lists.glob("*_Packages*")):
            self.cache.lists.mkdir(parents=True, exist_ok=True)
            self.stock.apt("reading the archive's index", "vmm-index", ["apt-get", "update"])
        argv = ["apt-get", "install", "-y", "--download-only", "--no-install-recommends"]
        argv += ["-o", "Dir::Cache::Archives=/lab/debs", f"{PACKAGE}/{BACKPORTS}"]
        self.stock.apt(f"fetching QEMU of {BACKPORTS} (about 25 MB)", "vmm-fetch", argv, {debs: "/lab/debs"})

    def _unpack_qemu(self, partial: Path) -> None:
        root = partial / "root"
        remove(root)
        (root / "bin").mkdir(parents=True)
        unwanted = " ".join(f"usr/share/qemu/{shlex.quote(pattern).replace(chr(39), '')}" for pattern in LEFT_OUT)
        script = f"""
        for deb in /lab/debs/*.deb; do dpkg-deb -x $deb /lab/root/newer; done
        cd /lab/root/newer; rm -rf {unwanted} usr/share/doc usr/share/man usr/share/locale usr/lib/debug
        [ -e usr/share/seabios ] || ln -s /usr/share/seabios usr/share/seabios
        for rom in /usr/share/qemu/*.rom; do ln -s $rom usr/share/qemu/ 2>/dev/null || true; done
        dpkg-query -W -f '${{Version}}' {PACKAGE} >/lab/root/tree-version
        dpkg-deb -f /lab/debs/{PACKAGE}_*.deb Version >/lab/root/newer-version
        """
        chroot = self.tree.chroot(binds={partial / "debs": "/lab/debs", root: "/lab/root"})
        self.progress.call("unpacking it", chroot.argv(["sh", "-ec", script]), self.cache.log("vmm-unpack"))
        for kind, prefix in (("tree", ""), ("newer", f"{INSIDE}/qemu/newer")):
            version = (root / f"{kind}-version").read_text().strip()
            series = ".".join(version.split(":")[-1].split("+")[0].split(".")[:2])
            program = root / "bin" / f"qemu-{series}"
            program.write_text(wrapper(prefix))
            program.chmod(0o755)
        if len(list((root / "bin").iterdir())) != 2:
            raise LabError(
                f"{BACKPORTS} has no newer QEMU than {SUITE}",
                f"Both are {version}.",
                "tools/lab run -- qemu-system-x86_64 --version",
            )

    def _guest(self) -> Path:
        kernel = GuestKernelBuilder(self.stock, self._folder("kernels")).ensure()
        digest = hashlib.sha256(repr((kernel.folder.name, self.tree.identity(), PROGRAMS, FLAGS)).encode())
        for path in sorted(self.sources.glob("*.[ch]")):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        target = self._folder("guests") / digest.hexdigest()[:12]
        if not target.exists():
            with building(target) as partial:
                self._build_guest(partial, kernel)
            hold(target)
            forget_old(target.parent, KEPT)
        return hold(target) / "image"

    def _build_guest(self, partial: Path, kernel: GuestKernel) -> None:
        root = partial / "root"
        root.mkdir()
        lines = ["cd /lab/source"]
        for source, (program, flags) in PROGRAMS.items():
            lines.append(shlex.join(["gcc", *FLAGS, *flags, "-o", f"/lab/root/{program}", source]))
        chroot = self.tree.chroot(binds={self.sources: "/lab/source", root: "/lab/root"})
        argv = chroot.argv(["sh", "-ec", "\n".join(lines)])
        self.progress.call("building the guest's programs", argv, self.cache.log("vmm-programs"))
        cpio = Cpio()
        for name in ("dev", "proc", "sys"):
            cpio.folder(name)
        cpio.character_device("dev/console", 5, 1)
        cpio.file("init", (root / "init").read_bytes(), executable=True)
        (root / "initrd").write_bytes(cpio.finish())
        shutil.copyfile(kernel.image, root / "vmlinux")
        (root / "guest.json").write_text(json.dumps({"kernel": kernel.version}) + "\n")
        (root / "init").unlink()
        make_image(self.cache, self.progress, root, partial / "image", "writing the guest's image")
        remove(root)

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def wrapper(prefix: str) -> str:
    """Return a script that starts the QEMU below a prefix with the libraries that came with it."""
    libraries = f"LD_LIBRARY_PATH={prefix}/usr/lib/x86_64-linux-gnu " if prefix else ""
    return f'#!/bin/sh\n{libraries}exec {prefix}/usr/bin/qemu-system-x86_64 "$@"\n'
