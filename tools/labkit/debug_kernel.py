"""A kernel that watches itself: User Mode Linux with KASAN and lock checking, built from the distribution's source.

The distribution has no debugging kernel, and one for a VM would take an hour to build and be too slow there. User Mode
Linux is a process of the host, so its code runs at the machine's own speed.
"""

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

from labkit import archive
from labkit.cache import building, once, remove, size
from labkit.errors import LabError
from labkit.kernel import Builder
from labkit.modules import own_sources

NEEDED_BYTES = 6_000_000_000
KEPT = 2
OWN = "vdpa_hwsim"
# What building a kernel needs and the tree does not have.
TOOLS = ("flex", "bison")
# Unpacked without the bulk that no User Mode Linux is made of. Kconfig and Makefiles stay: others refer to them.
LEFT_OUT = (
    *("*/Documentation/*.rst", "*/Documentation/*.yaml", "*/Documentation/*.txt", "*/tools/testing/*"),
    *(f"*/drivers/{folder}/*.[ch]" for folder in ("gpu", "net/ethernet", "net/wireless", "media", "infiniband")),
    *(f"*/drivers/{folder}/*.[ch]" for folder in ("staging", "scsi", "iio", "clk", "pinctrl")),
    "*/sound/*.[ch]",
    "*/arch/*/boot/dts/*",
    *(f"*/arch/{name}/*.[chS]" for name in ("alpha", "arc", "arm", "arm64", "csky", "hexagon", "loongarch", "m68k")),
    *(f"*/arch/{name}/*.[chS]" for name in ("microblaze", "mips", "nios2", "openrisc", "parisc", "powerpc", "riscv")),
    *(f"*/arch/{name}/*.[chS]" for name in ("s390", "sh", "sparc", "xtensa")),
)
# What has to be in the configuration; the build stops if one of them did not make it.
REQUIRED = {
    **dict.fromkeys(("KASAN", "KASAN_GENERIC", "PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_LIST"), "y"),
    **dict.fromkeys(("DEBUG_OBJECTS", "DEBUG_OBJECTS_WORK", "DEBUG_OBJECTS_TIMERS", "PAGE_POISONING"), "y"),
    **dict.fromkeys(("DEBUG_VM", "DEBUG_KMEMLEAK", "DEBUG_FS", "STACKTRACE", "KALLSYMS"), "y"),
    **dict.fromkeys(("MODULES", "MODULE_UNLOAD", "HOSTFS", "DEVTMPFS", "TMPFS", "EVENTFD", "MEMFD_CREATE"), "y"),
    **dict.fromkeys(("NET", "INET", "UNIX", "PACKET", "VLAN_8021Q", "NET_NS", "VIRTIO_NET"), "y"),
    # devices of the vdpa bus need DMA masks, which only this brings to User Mode Linux
    **dict.fromkeys(("PCI", "VIRTIO_UML", "UML_PCI_OVER_VIRTIO"), "y"),
    **dict.fromkeys(("VDPA", "VHOST_VDPA", "VIRTIO_VDPA"), "m"),
}
SETTINGS = {
    **REQUIRED,
    **dict.fromkeys(("DEBUG_KERNEL", "VHOST_MENU", "VIRTIO_MENU", "KASAN_OUTLINE", "DEBUG_INFO_NONE"), "y"),
    "UML_PCI_OVER_VIRTIO_DEVICE_ID": "1234",
    "DEBUG_KMEMLEAK_MEM_POOL_SIZE": "40000",
    "LOCKDEP_CHAINS_BITS": "18",
    **dict.fromkeys(("STATIC_LINK", "WERROR", "MODULE_SIG", "DEBUG_INFO_BTF", "DEBUG_KMEMLEAK_AUTO_SCAN"), "n"),
    **dict.fromkeys(("EXT4_FS", "REISERFS_FS", "ISO9660_FS", "AUTOFS_FS", "INPUT", "HID", "SOUND", "PPP"), "n"),
    **dict.fromkeys(("SLIP", "USB_SUPPORT", "HWMON", "WIRELESS", "BLK_DEV_LOOP", "BLK_DEV_NBD", "IOSCHED_BFQ"), "n"),
}
BUILD = "make ARCH=um"


def configuration(settings: dict[str, str]) -> str:
    """Return settings as lines of a kernel's .config."""
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in settings.items()
    )


def lacking(config: str, required: dict[str, str]) -> list[str]:
    """Return what a .config does not have of what it should."""
    lines = set(config.splitlines())
    return [f"CONFIG_{name}={value}" for name, value in required.items() if f"CONFIG_{name}={value}" not in lines]


class DebugKernel:
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


class DebugBuilder:
    """Fetches a kernel's source and builds it; the result stays in the cache."""

    def __init__(self, stock: Builder) -> None:
        self.stock = stock
        self.cache, self.tree, self.progress = stock.cache, stock.tree, stock.progress
        # Deeper than where a set-up looks for leftovers: a build has a lock of its own, so that no run waits for it.
        self.root = self.cache.root / "debug" / "kernels"

    @staticmethod
    def recipe() -> str:
        """Return what tells builds of one source apart."""
        return hashlib.sha256(repr((TOOLS, LEFT_OUT, SETTINGS)).encode()).hexdigest()[:8]

    def find(self, wanted: str) -> DebugKernel | None:
        """Return the newest build in the cache that fits."""
        known = [DebugKernel(path.parent) for path in self.root.glob(f"*-{self.recipe()}/kernel.json")]
        fitting = [kernel for kernel in known if archive.fits(kernel.release, wanted)]
        return max(fitting, key=lambda kernel: archive.order(kernel.version)) if fitting else None

    def ensure(self, wanted: str) -> DebugKernel:
        """Return a kernel that fits; build one if there is none."""
        found = self.find(wanted)
        if found:
            return found
        choice = self.stock.choose(wanted)
        self.cache.require_space(NEEDED_BYTES, "a kernel's source and build")
        self.progress.say(
            f"kernel {choice.release} for debugging: {size(choice.source.size)} of source to download; "
            "the build takes 10 to 40 minutes, once"
        )
        target = self.root / f"{choice.version.replace(':', '_')}-{self.recipe()}"
        with building(target, goes_on=True) as partial:
            self._build(partial, choice.source, choice.version)
        builds = sorted(self.root.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in builds[KEPT:]:
            remove(old)
        return DebugKernel(target)

    def _build(self, partial: Path, source: archive.Package, version: str) -> None:
        build, tools = partial / "build", partial / "tools"
        once(partial, "fetch", lambda: self._fetch(partial / "work", source))
        once(partial, "unpack", lambda: self._unpack_source(partial, source))
        once(partial, "build", lambda: self._compile(partial))
        shutil.move(build / "linux", partial / "linux")
        shutil.rmtree(tools)
        [modules] = (partial / "layer/usr/lib/modules").iterdir()
        for link in ("build", "source"):
            (modules / link).unlink(missing_ok=True)
        (partial / "kernel.json").write_text(json.dumps({"release": modules.name, "version": version}) + "\n")

    def _fetch(self, work: Path, source: archive.Package) -> None:
        remove(work)
        work.mkdir()
        self.stock.apt("fetching its source", "debug-fetch", ["apt-get", "download", source.pin], {work: "/lab/debs"})
        argv = ["apt-get", "install", "-y", "--download-only", "--no-install-recommends"]
        argv += ["-o", "Dir::Cache::Archives=/lab/debs", *TOOLS]
        self.stock.apt("fetching what building it needs", "debug-fetch-tools", argv, {work: "/lab/debs"})

    def _unpack_source(self, partial: Path, source: archive.Package) -> None:
        binds = {partial / name: f"/lab/{name}" for name in ("work", "build", "tools")}
        for name in ("build", "tools"):
            remove(partial / name)
            (partial / name).mkdir()
        self._script("unpacking its source", "unpack", self._unpack(source.name), binds)
        remove(partial / "work")

    def _compile(self, partial: Path) -> None:
        build, tools, layer = partial / "build", partial / "tools", partial / "layer"
        remove(layer)
        layer.mkdir()
        binds = {build: "/lab/build", tools: "/lab/tools", layer: "/lab/layer"}
        (build / "lab.config").write_text(configuration(SETTINGS))
        lines = [f"{BUILD} defconfig", "cat lab.config >>.config", f"{BUILD} olddefconfig"]
        self._script("configuring it", "configure", ["cd /lab/build", *lines], binds, (tools,))
        missing = lacking((build / ".config").read_text(), REQUIRED)
        if missing:
            raise LabError(
                "the kernel's configuration refuses what debugging needs",
                f"Not taken: {', '.join(missing)}.",
                "tools/lab soak hwsim-kasan --kernel 6.12",
            )
        jobs = len(os.sched_getaffinity(0))
        lines = [f"nice {BUILD} -j{jobs} linux modules", f"{BUILD} INSTALL_MOD_PATH=/lab/layer/usr modules_install"]
        self._script("building it", "build", ["cd /lab/build", *lines], binds, (tools,))
        self._script("removing what is not needed any more", "prune", self._prune(), binds)

    @staticmethod
    def _unpack(package: str) -> list[str]:
        left_out = " ".join(f"--exclude={shlex.quote(pattern)}" for pattern in LEFT_OUT)
        return [
            f"dpkg-deb --fsys-tarfile /lab/work/{package}_*.deb | tar -xO ./usr/src/{package}.tar.xz "
            f"| tar -xJ -C /lab/build --strip-components=1 {left_out}",
            f"find /lab/work -name '*.deb' -not -name '{package}_*' -exec dpkg-deb -x '{{}}' /lab/tools ';'",
        ]

    @staticmethod
    def _prune() -> list[str]:
        """Keep headers, scripts and symbols: what modules are built against."""
        own = "-not -path './scripts/*' -not -path './tools/*' -type f"
        return [
            "cd /lab/build",
            f"find . {own} '(' -name '*.[coaS]' -o -name '*.cmd' -o -name '*.ko' -o -name 'vmlinux*' ')' -delete",
            "rm -rf Documentation sound drivers fs/*/ net/*/",
        ]

    def _script(
        self, title: str, log: str, lines: list[str], binds: dict[Path, str], layers: tuple[Path, ...] = ()
    ) -> None:
        chroot = self.tree.chroot(binds=binds, layers=layers)
        self.progress.call(title, chroot.argv(["sh", "-ec", "\n".join(lines)]), self.cache.log(f"debug-{log}"))

    def module(self, kernel: DebugKernel, project: Path) -> Path:
        """Return the project's own module, built against a debugging kernel."""
        sources = own_sources(OWN, project / "tools" / OWN)
        digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:12]
        target = kernel.folder / "own" / f"{OWN}-{digest}"
        if not target.exists():
            with building(target) as partial:
                for path in sources:
                    shutil.copyfile(path, partial / path.name)
                argv = ["make", "-C", "/lab/build", "ARCH=um", "M=/lab/source", "modules"]
                chroot = self.tree.chroot(binds={kernel.build: "/lab/build", partial: "/lab/source"})
                self.progress.call(f"building {OWN}", chroot.argv(argv), self.cache.log(f"debug-{OWN}"))
        return target / f"{OWN}.ko"
