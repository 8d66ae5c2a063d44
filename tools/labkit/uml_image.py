"""User Mode Linux within a VM: the kernel that is a process, its modules, and what helps it, as an image.

It is that of `--machine uml` (uml_home.py): there it is the machine, here a virtual machine in front of a device.
"""

import hashlib
import shlex
import shutil
from pathlib import Path

from labkit import xstate
from labkit.cache import building, forget_old, hold, remove
from labkit.images import make_image
from labkit.kernel import Builder
from labkit.uml_config import PLAIN
from labkit.uml_kernel import UmlBuilder, UmlKernel

KEPT = 2


class UmlImage:
    """Makes the image; what is there is used."""

    def __init__(self, stock: Builder, root: Path) -> None:
        self.stock = stock
        self.cache, self.tree, self.progress = stock.cache, stock.tree, stock.progress
        self.root = root

    def ensure(self, wanted: str) -> Path:
        """Return the image with a kernel that fits; build that kernel if necessary."""
        kernel = self._kernel(wanted)
        digest = hashlib.sha256(repr((kernel.folder.name, self.tree.identity())).encode())
        digest.update(xstate.SOURCE.read_bytes())
        target = self.root / digest.hexdigest()[:12]
        if not target.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            with building(target) as partial:
                self._build(partial, kernel)
            hold(target)
            forget_old(self.root, KEPT)
        return hold(target) / "image"

    def _kernel(self, wanted: str) -> UmlKernel:
        builder = UmlBuilder(self.stock, PLAIN)
        if builder.find(wanted):
            # not behind one that is being built, which may take long
            return builder.ensure(wanted)
        with self.cache.building_kernel():
            return builder.ensure(wanted)

    def _build(self, partial: Path, kernel: UmlKernel) -> None:
        root = partial / "root"
        # where modprobe looks for modules within a folder that it is given
        shutil.copytree(kernel.layer / "usr/lib/modules", root / "lib/modules", symlinks=True)
        binds = {root: "/lab/root", kernel.folder: "/lab/kernel", xstate.SOURCE.parent: "/lab/source"}
        lines = [
            shlex.join(["strip", "-o", "/lab/root/linux", f"/lab/kernel/{kernel.program.name}"]),
            # the VM's processor may be one whose state is too large, as that of the machine may be
            xstate.build_command("/lab/root", f"/lab/source/{xstate.SOURCE.name}"),
        ]
        argv = self.tree.chroot(binds=binds).argv(["sh", "-ec", "\n".join(lines)])
        self.progress.call("taking User Mode Linux along", argv, self.cache.log("vmm-uml"))
        make_image(self.cache, self.progress, root, partial / "image", "writing its image")
        remove(root)
