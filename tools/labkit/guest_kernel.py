"""The kernel of the virtual machines that are moved: as small as it gets, built from the distribution's source.

It has what a virtual machine with one virtio-net device needs (PCI, MSI-X, IPv4, packet sockets, a serial console) and
nothing else: it is emulated by a QEMU that is itself emulated, where each initcall is felt.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from labkit import archive
from labkit.cache import building, forget_old, hold, once, size
from labkit.errors import LabError
from labkit.kernel import Builder
from labkit.kernel_source import LEFT_OUT, TOOLS, SourceTree, configuration, lacking

WANTED = "6.12"
"""One kernel line for all guests, whatever kernel the devices run on: figures of guests are compared."""
NEEDED_BYTES = 3_000_000_000
KEPT = 2
GUEST_TOOLS = (*TOOLS, "libelf-dev")
# The build stops if one of these is not in the configuration that it made.
REQUIRED = {
    **dict.fromkeys(("64BIT", "PVH", "BLK_DEV_INITRD", "BINFMT_ELF", "PRINTK", "SERIAL_8250_CONSOLE"), "y"),
    **dict.fromkeys(("PCI_MSI", "VIRTIO_PCI", "VIRTIO_NET", "VIRTIO_BALLOON", "VIRTIO_MEM"), "y"),
    **dict.fromkeys(("INET", "PACKET", "PROC_FS", "SYSFS", "DEVTMPFS", "EPOLL", "HIGH_RES_TIMERS"), "y"),
    **dict.fromkeys(("X86_MPPARSE", "X86_IO_APIC", "NO_HZ_IDLE", "HZ_100", "TIMERFD", "FUTEX"), "y"),
}
SETTINGS = {
    **REQUIRED,
    # where the menus above are found
    **dict.fromkeys(("HYPERVISOR_GUEST", "TTY", "SERIAL_8250", "PCI", "NET", "NETDEVICES", "NET_CORE"), "y"),
    **dict.fromkeys(("VIRTIO_MENU", "EXPERT", "MULTIUSER", "POSIX_TIMERS", "EVENTFD", "SIGNALFD", "UNIX"), "y"),
    **dict.fromkeys(("X86_UP_APIC", "X86_UP_IOAPIC", "X86_X2APIC", "PRINTK_TIME", "POWER_RESET"), "y"),
    **dict.fromkeys(("DEVTMPFS_MOUNT", "TMPFS", "SHMEM", "PROC_SYSCTL", "ADVISE_SYSCALLS", "BUG", "ELF_CORE"), "y"),
    # memory that is taken away again: a balloon, and virtio-mem
    **dict.fromkeys(("MEMORY_HOTPLUG", "MEMORY_HOTREMOVE", "MIGRATION", "COMPACTION", "PAGE_REPORTING"), "y"),
    # fast rather than small
    "CC_OPTIMIZE_FOR_PERFORMANCE": "y",
    **dict.fromkeys(("CC_OPTIMIZE_FOR_SIZE", "SLUB_TINY", "SMP", "ACPI", "PARAVIRT", "CPU_MITIGATIONS"), "n"),
    **dict.fromkeys(("MICROCODE", "KALLSYMS", "DEBUG_KERNEL", "WERROR", "ETHERNET", "WLAN", "WIRELESS", "IPV6"), "n"),
    **dict.fromkeys(("VIRTIO_PCI_LEGACY", "RTC_CLASS", "VT", "INPUT", "SERIO", "HID", "PCI_QUIRKS", "HW_RANDOM"), "n"),
    **dict.fromkeys((f"RD_{name}" for name in ("GZIP", "BZIP2", "LZMA", "XZ", "LZO", "LZ4", "ZSTD")), "n"),
}
BUILD = "make KBUILD_BUILD_TIMESTAMP=1 KBUILD_BUILD_USER=lab KBUILD_BUILD_HOST=lab"


class GuestKernel:
    """One build: `folder/vmlinux`, which QEMU boots by PVH, and its `config`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "vmlinux"

    @property
    def version(self) -> str:
        """Return the version of the source's Debian package."""
        return str(json.loads((self.folder / "kernel.json").read_text())["version"])


class GuestKernelBuilder:
    """Fetches a kernel's source and builds it; the result stays in the cache."""

    def __init__(self, stock: Builder, root: Path) -> None:
        self.stock = stock
        self.root = root
        self.source = SourceTree(stock, "guest", GUEST_TOOLS)

    @staticmethod
    def recipe() -> str:
        """Return the key that distinguishes builds of one source."""
        return hashlib.sha256(repr((GUEST_TOOLS, LEFT_OUT, SETTINGS, BUILD)).encode()).hexdigest()[:8]

    def find(self) -> GuestKernel | None:
        """Return the newest build in the cache."""
        known = [GuestKernel(path.parent) for path in self.root.glob(f"*-{self.recipe()}/kernel.json")]
        return max(known, key=lambda kernel: archive.order(kernel.version)) if known else None

    def ensure(self) -> GuestKernel:
        """Return the guests' kernel; build it if necessary."""
        found = self.find()
        if found:
            hold(found.folder)
            return found
        choice = self.stock.choose(WANTED)
        self.stock.cache.require_space(NEEDED_BYTES, "a kernel's source and build")
        self.stock.progress.say(
            f"the guests' kernel: {size(choice.source.size)} of source to download; "
            "the build takes 3 to 10 minutes, once"
        )
        target = self.root / f"{choice.version.replace(':', '_')}-{self.recipe()}"
        with building(target, goes_on=True) as partial:
            once(partial, "fetch", lambda: self.source.fetch(partial / "work", choice.source))
            once(partial, "unpack", lambda: self.source.unpack(partial, choice.source))
            once(partial, "compile", lambda: self._compile(partial))
            for name in ("build", "tools"):
                shutil.rmtree(partial / name)
            (partial / "kernel.json").write_text(json.dumps({"version": choice.version}) + "\n")
        hold(target)
        forget_old(self.root, KEPT)
        return GuestKernel(target)

    def _compile(self, partial: Path) -> None:
        build, tools = partial / "build", partial / "tools"
        binds = {build: "/lab/build", tools: "/lab/tools", partial: "/lab/out"}
        (build / "lab.config").write_text(configuration(SETTINGS))
        lines = [f"{BUILD} tinyconfig", "cat lab.config >>.config", f"{BUILD} olddefconfig"]
        self.source.script("configuring it", "configure", ["cd /lab/build", *lines], binds, (tools,))
        missing = lacking((build / ".config").read_text(), REQUIRED)
        if missing:
            raise LabError(
                "the configuration of the guests' kernel refuses something that it needs",
                f"Not taken: {', '.join(missing)}.",
                "tools/lab setup --vmm",
            )
        jobs = len(os.sched_getaffinity(0))
        lines = [f"nice -n 5 {BUILD} -j{jobs} vmlinux", "strip -o /lab/out/vmlinux vmlinux"]
        self.source.script(
            "building it", "build", ["cd /lab/build", *lines, "cp .config /lab/out/config"], binds, (tools,)
        )
