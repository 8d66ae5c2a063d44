"""The configurations of User Mode Linux that the lab builds, as data: one that watches itself, and a plain one."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Flavour:
    """One configuration: `required` is what has to be in it, and the build stops if some of it did not make it."""

    name: str
    folder: str
    purpose: str
    minutes: str
    required: Mapping[str, str]
    settings: Mapping[str, str]
    next_step: str


# Devices of the vdpa bus need DMA masks, which only PCI brings to User Mode Linux.
BASE = {
    **dict.fromkeys(("MODULES", "MODULE_UNLOAD", "HOSTFS", "DEVTMPFS", "TMPFS", "EVENTFD", "MEMFD_CREATE"), "y"),
    **dict.fromkeys(("NET", "INET", "UNIX", "PACKET", "VLAN_8021Q", "NET_NS"), "y"),
    **dict.fromkeys(("PCI", "VIRTIO_UML", "UML_PCI_OVER_VIRTIO", "DEBUG_FS", "KALLSYMS"), "y"),
    **dict.fromkeys(("VDPA", "VHOST_VDPA", "VIRTIO_VDPA"), "m"),
}
MENUS = {
    **dict.fromkeys(("VHOST_MENU", "VIRTIO_MENU", "DEBUG_INFO_NONE"), "y"),
    "UML_PCI_OVER_VIRTIO_DEVICE_ID": "1234",
}
LEFT_OUT = {
    **dict.fromkeys(("STATIC_LINK", "WERROR", "MODULE_SIG", "DEBUG_INFO_BTF"), "n"),
    **dict.fromkeys(("EXT4_FS", "REISERFS_FS", "ISO9660_FS", "AUTOFS_FS", "INPUT", "HID", "SOUND", "PPP"), "n"),
    **dict.fromkeys(("SLIP", "USB_SUPPORT", "HWMON", "WIRELESS", "BLK_DEV_LOOP", "BLK_DEV_NBD", "IOSCHED_BFQ"), "n"),
}

_WATCHES = {
    **BASE,
    **dict.fromkeys(("KASAN", "KASAN_GENERIC", "PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_LIST"), "y"),
    **dict.fromkeys(("DEBUG_OBJECTS", "DEBUG_OBJECTS_WORK", "DEBUG_OBJECTS_TIMERS", "PAGE_POISONING"), "y"),
    **dict.fromkeys(("DEBUG_VM", "DEBUG_KMEMLEAK", "STACKTRACE", "VIRTIO_NET"), "y"),
}
DEBUG = Flavour(
    name="debug",
    folder="debug/kernels",
    purpose="for debugging",
    minutes="10 to 40",
    required=_WATCHES,
    settings={
        **_WATCHES,
        **MENUS,
        **dict.fromkeys(("DEBUG_KERNEL", "KASAN_OUTLINE"), "y"),
        "DEBUG_KMEMLEAK_MEM_POOL_SIZE": "40000",
        "LOCKDEP_CHAINS_BITS": "18",
        "DEBUG_KMEMLEAK_AUTO_SCAN": "n",
        **LEFT_OUT,
    },
    next_step="tools/lab soak hwsim-kasan --kernel 6.12",
)

_WORKS = {
    **BASE,
    # VDUSE is not to be had: it depends on ARCH_HAS_DMA_OPS, which User Mode Linux lacks
    **dict.fromkeys(("VDPA_SIM", "VDPA_SIM_NET", "VDPA_SIM_BLOCK"), "m"),
    **dict.fromkeys(("VIRTIO_NET", "VIRTIO_BLK", "BRIDGE", "VETH", "DUMMY", "TUN"), "m"),
    # what clients of the devices are made of: Python, QEMU, DPDK
    **dict.fromkeys(("EPOLL", "SIGNALFD", "TIMERFD", "AIO", "IO_URING", "FUTEX", "CROSS_MEMORY_ATTACH"), "y"),
    **dict.fromkeys(("USERFAULTFD", "POSIX_MQUEUE", "SYSVIPC", "FHANDLE", "MEMBARRIER", "UNIX98_PTYS"), "y"),
    **dict.fromkeys(("UNIX_DIAG", "INET_DIAG", "PID_NS", "USER_NS", "UTS_NS", "IPC_NS"), "y"),
    **dict.fromkeys(("HIGH_RES_TIMERS", "NO_HZ_IDLE", "PROC_PAGE_MONITOR"), "y"),
    **dict.fromkeys(("TRACING", "ENABLE_DEFAULT_TRACERS"), "y"),
    # disks: QEMU and its guest are images, as they are for a VM
    **dict.fromkeys(("BLK_DEV_UBD", "EXT4_FS"), "y"),
}
PLAIN = Flavour(
    name="uml",
    folder="uml/kernels",
    purpose="as User Mode Linux",
    minutes="5 to 15",
    required=_WORKS,
    settings={
        **_WORKS,
        **MENUS,
        **dict.fromkeys(("RUNTIME_TESTING_MENU", "NETDEVICES", "NET_CORE", "NAMESPACES", "BLK_DEV", "FTRACE"), "y"),
        **dict.fromkeys(("DEBUG_KERNEL", "SLUB_DEBUG", "UML_NET", "MD", "SCSI", "ATA"), "n"),
        # what nothing here asks for, and takes minutes to build
        **dict.fromkeys(("IPV6", "ETHTOOL_NETLINK", "PTP_1588_CLOCK", "ETHERNET", "WLAN", "PCI_QUIRKS"), "n"),
        **dict.fromkeys(("KEYBOARD_ATKBD", "MOUSE_PS2", "SERIO", "EFI_PARTITION", "PCIEASPM", "VGA_ARB"), "n"),
        **{name: value for name, value in LEFT_OUT.items() if name != "EXT4_FS"},
    },
    next_step="tools/lab run --machine uml --kernel 6.12 -- true",
)
