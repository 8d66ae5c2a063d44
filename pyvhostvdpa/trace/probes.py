# SPDX-License-Identifier: MIT
"""The places in the kernel at which a recording listens, and how to ask for them.

Every system call on a vhost-vdpa chardev enters drivers/vhost/vdpa.c through one of five functions. Each gets a probe
at its begin and one at its end. What a kernel takes differs: function or kernel probes, arguments by name (BTF) or by
number, arguments at the end or not. So each probe has several forms, and the first that the kernel accepts is used.

Source: Documentation/trace/fprobetrace.rst and kprobetrace.rst.
"""

from __future__ import annotations

from dataclasses import dataclass

RDEV_WIDTH = 20
"""Bits of a minor number in the kernel's dev_t (include/linux/kdev_t.h)."""

_WORDS = " ".join(f"a{place}=+u{8 * place}({{0}}):u64" for place in range(4))
"""The argument of a request: 32 bytes are the largest structure, vhost_vring_addr without the address of a log."""
_MESSAGE = "iova={0}:u64 size={1}:u64 uaddr={2}:u64 perm={3}:u8 type={4}:u8"
_BY_NAME = _MESSAGE.format("msg->iova", "msg->size", "msg->uaddr", "msg->perm", "msg->type")
_BY_OFFSET = _MESSAGE.format("+0($arg3)", "+8($arg3)", "+16($arg3)", "+24($arg3)", "+25($arg3)")
"""``struct vhost_iotlb_msg`` is user API: its layout is fixed."""


@dataclass(frozen=True, slots=True)
class KernelProbe:
    """One place. ``forms`` are its arguments, the best first; a recording works without an ``optional`` one."""

    name: str
    function: str
    at_end: bool
    forms: tuple[str, ...]
    optional: bool = False

    def definitions(self, group: str) -> list[str]:
        """Return each way of asking for it, the best first: a line for ``dynamic_events``."""
        place = f"{group}/{self.name} {self.function}"
        if self.at_end:
            kinds = [f"f:{place}%return {{}}", f"r64:{place} {{}}"]
        else:
            kinds = [f"f:{place} {{}}", f"p:{place} {{}}"]
        return [kind.format(form).rstrip() for form in self.forms for kind in kinds]


def _file(names: tuple[str, ...], more: str) -> tuple[str, ...]:
    """Return forms of a probe that has the chardev's file: its device number, else its name, else its address."""
    by_name, number = names
    return (
        f"rdev={by_name}->f_inode->i_rdev:u32 {more}",
        f"file=${number}:u64 name=${number}:%pD {more}",
        f"file=${number}:u64 {more}",
    )


_BY_PLACE = _file(("filep", "arg1"), f"cmd=$arg2:u32 {_WORDS.format('$arg3')}")[1:]
PROBES = (
    KernelProbe(
        "open", "vhost_vdpa_open", False, ("rdev=inode->i_rdev:u32 comm=$comm", *_file(("filep", "arg2"), "comm=$comm"))
    ),
    KernelProbe("open_end", "vhost_vdpa_open", True, ("ret=$retval:s32",)),
    KernelProbe(
        "ioctl",
        "vhost_vdpa_unlocked_ioctl",
        False,
        ("rdev=filep->f_inode->i_rdev:u32 cmd=cmd:u32", *_BY_PLACE),
    ),
    KernelProbe(
        "ioctl_end",
        "vhost_vdpa_unlocked_ioctl",
        True,
        (
            f"ret=$retval:s64 {_WORDS.format('arg')}",
            f"ret=$retval:s64 {_WORDS.format('$arg3')}",
            "ret=$retval:s64",
        ),
    ),
    KernelProbe(
        "write",
        "vhost_vdpa_chr_write_iter",
        False,
        (
            "rdev=iocb->ki_filp->f_inode->i_rdev:u32 count=from->count:u64",
            "file=+0($arg1):u64 name=+0($arg1):%pD",
            "file=+0($arg1):u64",
        ),
    ),
    KernelProbe(
        "message", "vhost_vdpa_process_iotlb_msg", False, (f"asid=asid:u32 {_BY_NAME}", f"asid=$arg2:u32 {_BY_OFFSET}")
    ),
    KernelProbe("write_end", "vhost_vdpa_chr_write_iter", True, ("ret=$retval:s64",)),
    KernelProbe(
        "mmap",
        "vhost_vdpa_mmap",
        False,
        ("rdev=vma->vm_file->f_inode->i_rdev:u32 index=vma->vm_pgoff:u64",),
        optional=True,
    ),
    KernelProbe("mmap_end", "vhost_vdpa_mmap", True, ("ret=$retval:s32",), optional=True),
    KernelProbe("release", "vhost_vdpa_release", False, _file(("filep", "arg2"), "")),
    KernelProbe("release_end", "vhost_vdpa_release", True, ("ret=$retval:s32",)),
)
"""All of them. ``kiocb`` has its file first (include/linux/fs.h)."""

IOCTL_WITH_WORDS = KernelProbe(
    "ioctl",
    "vhost_vdpa_unlocked_ioctl",
    False,
    (f"rdev=filep->f_inode->i_rdev:u32 cmd=cmd:u32 {_WORDS.format('arg')}", *_BY_PLACE),
)
"""Takes the place of ``ioctl`` where its end has no arguments: kernels know fields by name before they know those."""
