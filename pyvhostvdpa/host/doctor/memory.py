# SPDX-License-Identifier: MIT
"""Checks of what bounds a map."""

from __future__ import annotations

from collections.abc import Iterator

from ...memory.hugepages import advisable
from ...memory.pinned import HUGE_PAGE, PAGE_SIZE
from ..machine import Machine
from .finding import GuestSize, Level, Told, mebibytes, named

_ASK = "as root, in the first network namespace, with iproute2: vhost-vdpa list"


def _unknown(machine: Machine) -> str:
    """Say of which devices it is unknown whether they pin memory, and why; "" if it is known of all."""
    return "; ".join(f"{device.name}: {parent.memory}" for device, parent in named(machine) if parent.pinned is None)


def memory(machine: Machine, plan: GuestSize) -> Iterator[Told]:
    """Whether the guest's memory fits: into the machine, its cgroup, and RLIMIT_MEMLOCK."""
    yield from room(machine, plan)
    yield from memlock(machine, plan)


def room(machine: Machine, plan: GuestSize) -> Iterator[Told]:
    """Compare the guest with what the machine and the cgroup have left."""
    left = machine.available
    if left is None:
        return
    what = f"{mebibytes(plan.memory)} of guest memory; {mebibytes(left)} available ({machine.available_by})"
    fix = f"vhost-vdpa migrate SRC DST --memory {max(left // 2 >> 20, 1)}M, or free memory; a cgroup: raise its limit"
    if plan.memory > left:
        yield Told(Level.FAIL, what, "a guest that does not fit is refused, or killed later by the kernel", fix)
    elif 2 * plan.memory > left:
        why = "migrate has the guest's memory twice on this machine, once in each process"
        yield Told(Level.WARN, f"{what}: enough for send or receive, too little for migrate", why, fix)
    else:
        yield Told(Level.PASS, what)


def memlock(machine: Machine, plan: GuestSize) -> Iterator[Told]:
    """RLIMIT_MEMLOCK suffices for the guest, once per device; root is not exempt."""
    pinning = [device.name for device, parent in named(machine) if parent.pinned]
    need = machine.pinned + plan.memory * max(len(pinning), 1)
    limit = machine.memlock
    if limit is None or need <= limit:
        bound = "unlimited" if limit is None else mebibytes(limit)
        yield Told(Level.PASS, f"RLIMIT_MEMLOCK is {bound}: enough to pin {mebibytes(need)}")
        return
    what = f"RLIMIT_MEMLOCK is {limit >> 10} KiB, pinning the guest takes {mebibytes(need)}"
    why = "counted for each device and address space; CAP_IPC_LOCK does not help (drivers/vhost/vdpa.c)"
    fix = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit"
    if machine.uid == 0:
        yield Told(Level.INFO, f"{what}; as root this tool raises its own limit", why, f"for other programs: {fix}")
    elif pinning or not machine.devices:
        yield Told(Level.FAIL if pinning else Level.WARN, what, why, fix)
    elif unknown := _unknown(machine):
        yield Told(Level.WARN, f"{what}; {unknown}", why, fix)
    else:
        yield Told(Level.INFO, f"{what}; the devices here pin nothing", why)


def entry_limit(machine: Machine, plan: GuestSize) -> Iterator[Told]:
    """The limit of IOTLB entries per address space, and whether memory is contiguous enough."""
    limits = {d.name: p.max_iotlb_entries for d, p in named(machine) if p.pinned and p.max_iotlb_entries}
    if not limits:
        yield Told(Level.SKIP, "no pinning device with a known limit of IOTLB entries")
        return
    name, limit = min(limits.items(), key=lambda item: item[1])
    huge = advisable(machine.shmem_huge) or machine.free_huge * HUGE_PAGE >= plan.memory
    runs = plan.memory // (HUGE_PAGE if huge else PAGE_SIZE)
    what = f"{name}: at most {limit} IOTLB entries; {mebibytes(plan.memory)} may take {runs}"
    if runs <= limit:
        yield Told(Level.PASS, what + " in huge pages")
        return
    yield Told(
        Level.WARN,
        what,
        "each physically contiguous run takes one, and a map beyond the limit fails as EFAULT",
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or options vhost_vdpa max_iotlb_entries=N",
    )


def private_memory(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Devices that translate to user addresses skip private memory without an error."""
    users = [device.name for device, parent in named(machine) if parent.pinned is False]
    if users:
        yield Told(
            Level.WARN,
            f"{', '.join(users)}: works on user addresses and maps shared memory only",
            "a map of private memory returns success and maps nothing (drivers/vhost/vdpa.c:vhost_vdpa_va_map)",
            "use memfd (SharedMemory does); to imitate hardware: modprobe vdpa_sim use_va=0",
        )
    elif unknown := _unknown(machine):
        yield Told(Level.INFO, unknown, "one that works on user addresses maps shared memory only", _ASK)
    elif machine.devices:
        yield Told(Level.PASS, "the devices here pin what is mapped; private memory is mapped too")


def silent_batches(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """A batch that failed in the device is not reported."""
    devices = [device for device, _ in named(machine)]
    if not devices:
        return
    yield Told(
        Level.INFO,
        f"{', '.join(d.name for d in devices)}: the kernel does not report a batch of maps that failed",
        "the parent's answer at BATCH_END is ignored (drivers/vhost/vdpa.c)",
        f"vhost-vdpa probe {devices[0].name} --verify   (sends descriptors through such a map)",
    )


def map_cost(machine: Machine, plan: GuestSize) -> Iterator[Told]:
    """What mapping the guest may cost in downtime."""
    pinning = [device for device, parent in named(machine) if parent.pinned]
    if not pinning:
        unknown = _unknown(machine)
        yield Told(Level.SKIP, unknown or "no device that pins memory: mapping costs next to nothing")
        return
    contiguous = advisable(machine.shmem_huge) or machine.free_huge
    runs = plan.memory // (HUGE_PAGE if contiguous else PAGE_SIZE)
    yield Told(
        Level.INFO if contiguous else Level.WARN,
        f"{mebibytes(plan.memory)} of guest memory is up to {runs} contiguous runs to map",
        "without IOTLB_PERSIST and descriptor ASIDs they are mapped again within the downtime",
        f"vhost-vdpa migrate {pinning[0].chardev} OTHER --memory {plan.memory >> 20}M measures it",
    )
