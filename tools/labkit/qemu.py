"""QEMU's command line: one VM of the lab, by direct kernel boot."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BINARY = "qemu-system-x86_64"
# Chosen by measuring boots under emulation: "pc" is not faster, "qemu64" starts Python slower, LA57 costs a table walk.
MACHINE = "q35"
# Without fast string operations the kernel and libc move eight bytes or more at a time. The emulator does each
# of them on its own, and where a page holds code that it has translated it looks through all of that for each: seen
# were 2 ms a byte, and a page fault of minutes. In virtual time they stay: published figures count instructions.
CPU = {"kvm": "host", "tcg": "max,la57=off,erms=off,fsrm=off", "icount": "max,la57=off"}
ACCELERATOR = {"kvm": "kvm", "tcg": "tcg,thread=multi", "icount": "tcg,thread=single"}
# With several CPUs, QEMU before 8.1 may read code that another CPU is patching and keep what it made of that (fixed by
# "accel/tcg: Always lock pages before translation"): a kernel that switches a static key or a probe then dies of an
# int3 of its own, now and then. Debian 12 has 7.2, so emulated VMs with several CPUs are started by the tree's QEMU.
FROM_TREE = "tcg"
CONTROL, OUT, ERR = 1, 2, 3


@dataclass(frozen=True)
class Share:
    """A folder of the host, mounted read-write at the same path in the VM."""

    path: Path
    tag: str


@dataclass(frozen=True)
class Hardware:
    """What the VM is made of."""

    kernel: Path
    initrd_fd: int
    disks: Sequence[Path]
    shares: Sequence[Share]
    ports: Mapping[int, int]
    console_log: Path
    mode: str = "tcg"
    tree: Path | None = None
    """The root of a Debian tree with a QEMU in it."""
    cpus: int = 2
    memory: str = "4G"
    shell_fd: int | None = None
    network_fd: int | None = None
    network_mac: str = ""
    extra: Sequence[str] = field(default_factory=tuple)


def kernel_arguments(mode: str) -> str:
    """Return the kernel's command line.

    Under emulation a boot is mostly the kernel's own start; what is switched off here (mitigations, self-tests of
    ciphers, security modules that nothing uses, the watchdog, address randomisation, and only there the protection of
    the kernel's own text and the zeroing of fresh memory) takes more than a third of it.
    """
    words = ["console=ttyS0", "quiet", "panic=-1", "mitigations=off", "nokaslr", "cryptomgr.notests", "audit=0"]
    words += ["nowatchdog", "apparmor=0", "lsm=capability,landlock"]
    if mode != "kvm":
        words += ["tsc=reliable", "rodata=off", "init_on_alloc=0"]
    return " ".join(words)


def program(mode: str, tree: Path | None) -> list[str]:
    """Return what starts the QEMU of a mode: this machine's own, or a tree's with the tree's libraries and firmware."""
    if mode != FROM_TREE or tree is None:
        return [BINARY]
    usr = tree / "usr"
    libraries = usr / "lib/x86_64-linux-gnu"
    return [
        *("env", f"QEMU_MODULE_DIR={libraries}/qemu"),
        *(str(tree / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(usr / "bin" / BINARY)),
        *(word for data in ("qemu", "seabios") for word in ("-L", str(usr / "share" / data))),
    ]


def command_line(hardware: Hardware) -> list[str]:
    """Return the arguments that start QEMU."""
    argv = [
        *program(hardware.mode, hardware.tree),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        MACHINE,
    ]
    argv += ["-accel", ACCELERATOR[hardware.mode], "-cpu", CPU[hardware.mode]]
    if hardware.mode == "icount":
        argv += ["-icount", "shift=0,sleep=off"]
    argv += ["-smp", str(hardware.cpus), "-m", hardware.memory]
    argv += ["-kernel", str(hardware.kernel), "-initrd", f"/proc/self/fd/{hardware.initrd_fd}"]
    argv += ["-append", kernel_arguments(hardware.mode), "-serial", f"file:{_escape(hardware.console_log)}"]
    for number, disk in enumerate(hardware.disks):
        argv += ["-drive", f"if=none,id=disk{number},file={_escape(disk)},format=raw,readonly=on"]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    argv += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci,id=ports,max_ports=8"]
    for port, descriptor in hardware.ports.items():
        argv += ["-chardev", f"socket,id=port{port},fd={descriptor}"]
        argv += ["-device", f"virtserialport,bus=ports.0,nr={port},chardev=port{port},name=lab.{port}"]
    if hardware.shell_fd is not None:
        argv += ["-chardev", f"socket,id=shell,fd={hardware.shell_fd}"]
        argv += ["-device", "virtconsole,bus=ports.0,nr=0,chardev=shell"]
    for share in hardware.shares:
        argv += [
            "-virtfs",
            f"local,path={_escape(share.path)},mount_tag={share.tag},security_model=none,multidevs=remap",
        ]
    if hardware.network_fd is not None:
        argv += ["-netdev", f"socket,id=net,fd={hardware.network_fd}"]
        argv += ["-device", f"virtio-net-pci,netdev=net,romfile=,mac={hardware.network_mac}"]
    return [*argv, *hardware.extra]


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


def version() -> str:
    """Return what identifies the QEMU on this machine, without starting it."""
    for folder in os.environ.get("PATH", "").split(":"):
        binary = Path(folder) / BINARY
        if binary.exists():
            status = binary.stat()
            return f"{status.st_size}-{int(status.st_mtime)}"
    return ""
