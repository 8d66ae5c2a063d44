"""User Mode Linux, built from the distribution's source: a kernel that is a process of the host.

Its code runs at the machine's own speed. That makes a kernel that watches itself bearable (the distribution has none,
and one for a VM would take an hour to build and be too slow there), and a plain one fast. See uml_config.py.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from labkit import archive
from labkit.cache import building, forget_old, hold, once, remove, size
from labkit.errors import LabError
from labkit.kernel import Builder
from labkit.kernel_source import LEFT_OUT, TOOLS, SourceTree, configuration, lacking
from labkit.modules import own_sources
from labkit.uml_config import Flavour

NEEDED_BYTES = 6_000_000_000
KEPT = 2
OWN = "vdpa_hwsim"
BUILD = "make ARCH=um"
RUN = "/lab/run"
KERNEL = "/lab/kernel"
"""Where it finds within the tree what belongs to this run, and itself."""


class UmlKernel:
    """One build: `folder/build` to build modules against, `folder/linux`, and `folder/layer` with the modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "linux"
        self.build = folder / "build"
        self.layer = folder / "layer"

    @property
    def release(self) -> str:
        """Return the kernel's name for itself."""
        return str(json.loads((self.folder / "kernel.json").read_text())["release"])

    @property
    def version(self) -> str:
        """Return the version of the source's Debian package."""
        return str(json.loads((self.folder / "kernel.json").read_text())["version"])


class UmlBuilder:
    """Fetches a kernel's source and builds it; the result stays in the cache."""

    def __init__(self, stock: Builder, flavour: Flavour) -> None:
        self.stock = stock
        self.flavour = flavour
        self.cache, self.tree, self.progress = stock.cache, stock.tree, stock.progress
        self.source = SourceTree(stock, flavour.name)
        # Deeper than where a set-up looks for leftovers: a build has a lock of its own, so that no run waits for it.
        self.root = self.cache.root / flavour.folder

    def recipe(self) -> str:
        """Return the key that distinguishes builds of one source."""
        return hashlib.sha256(repr((TOOLS, LEFT_OUT, self.flavour.settings)).encode()).hexdigest()[:8]

    def find(self, wanted: str) -> UmlKernel | None:
        """Return the newest build in the cache that fits."""
        known = [UmlKernel(path.parent) for path in self.root.glob(f"*-{self.recipe()}/kernel.json")]
        fitting = [kernel for kernel in known if archive.fits(kernel.release, wanted)]
        return max(fitting, key=lambda kernel: archive.order(kernel.version)) if fitting else None

    def ensure(self, wanted: str) -> UmlKernel:
        """Return a kernel that fits; build one if necessary."""
        found = self.find(wanted)
        if found:
            hold(found.folder)
            return found
        choice = self.stock.choose(wanted)
        self.cache.require_space(NEEDED_BYTES, "a kernel's source and build")
        self.progress.say(
            f"kernel {choice.release} {self.flavour.purpose}: {size(choice.source.size)} of source to download; "
            f"the build takes {self.flavour.minutes} minutes, once"
        )
        target = self.root / f"{choice.version.replace(':', '_')}-{self.recipe()}"
        with building(target, goes_on=True) as partial:
            self._build(partial, choice.source, choice.version)
        hold(target)
        forget_old(self.root, KEPT)
        return UmlKernel(target)

    def _build(self, partial: Path, source: archive.Package, version: str) -> None:
        build, tools = partial / "build", partial / "tools"
        once(partial, "fetch", lambda: self.source.fetch(partial / "work", source))
        once(partial, "unpack", lambda: self.source.unpack(partial, source))
        once(partial, "build", lambda: self._compile(partial))
        shutil.move(build / "linux", partial / "linux")
        shutil.rmtree(tools)
        [modules] = (partial / "layer/usr/lib/modules").iterdir()
        for link in ("build", "source"):
            (modules / link).unlink(missing_ok=True)
        (partial / "kernel.json").write_text(json.dumps({"release": modules.name, "version": version}) + "\n")

    def _compile(self, partial: Path) -> None:
        build, tools, layer = partial / "build", partial / "tools", partial / "layer"
        remove(layer)
        layer.mkdir()
        binds = {build: "/lab/build", tools: "/lab/tools", layer: "/lab/layer"}
        (build / "lab.config").write_text(configuration(self.flavour.settings))
        lines = [f"{BUILD} defconfig", "cat lab.config >>.config", f"{BUILD} olddefconfig"]
        self.source.script("configuring it", "configure", ["cd /lab/build", *lines], binds, (tools,))
        missing = lacking((build / ".config").read_text(), self.flavour.required)
        if missing:
            raise LabError(
                "the kernel's configuration refuses something that it needs",
                f"Not taken: {', '.join(missing)}.",
                self.flavour.next_step,
            )
        jobs = len(os.sched_getaffinity(0))
        lines = [f"nice {BUILD} -j{jobs} linux modules", f"{BUILD} INSTALL_MOD_PATH=/lab/layer/usr modules_install"]
        self.source.script("building it", "build", ["cd /lab/build", *lines], binds, (tools,))
        self.source.script("removing what is not needed any more", "prune", self._prune(), binds)

    @staticmethod
    def _prune() -> list[str]:
        """Keep headers, scripts and symbols: what modules are built against."""
        own = "-not -path './scripts/*' -not -path './tools/*' -type f"
        return [
            "cd /lab/build",
            f"find . {own} '(' -name '*.[coaS]' -o -name '*.cmd' -o -name '*.ko' -o -name 'vmlinux*' ')' -delete",
            "rm -rf Documentation sound drivers fs/*/ net/*/",
        ]

    def module(self, kernel: UmlKernel, project: Path) -> Path:
        """Return the project's own module, built against a kernel."""
        sources = own_sources(OWN, project / "tools" / OWN)
        digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:12]
        target = kernel.folder / "own" / f"{OWN}-{digest}"
        if not target.exists():
            with building(target) as partial:
                for path in sources:
                    shutil.copyfile(path, partial / path.name)
                self.make_modules(kernel, partial)
        return target / f"{OWN}.ko"

    def make_modules(self, kernel: UmlKernel, source: Path) -> None:
        """Build the modules of a folder in place, against a kernel."""
        argv = ["make", "-C", "/lab/build", "ARCH=um", "M=/lab/source", "modules"]
        chroot = self.tree.chroot(binds={kernel.build: "/lab/build", source: "/lab/source"})
        self.progress.call(f"building {OWN}", chroot.argv(argv), self.cache.log(f"{self.flavour.name}-{OWN}"))


def as_child(words: Sequence[str]) -> list[str]:
    """Return the command that runs a kernel as a child: as the first process of a namespace it would outlive a panic.

    It ends itself by a signal then, and the first process of a namespace takes none.
    """
    return ["sh", "-c", '"$@"; exit $?', "uml", *words]


def arguments(memory: str) -> list[str]:
    """Return the arguments that start a kernel within the tree: its console is its standard output."""
    root = ["rootfstype=hostfs", "rootflags=/", "rw", f"init={RUN}/init"]
    return [f"{KERNEL}/linux", f"mem={memory}", *root, "con=null", "con0=null,fd:1", "panic=-1"]
