"""One case that succeeds and one that fails for each request; test_ioctls.py runs them and demands all.

A case gets an open device. The door's trace shows whether it made the request
that it is filed under, so that none can pass by doing something else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

from pyvhostvdpa import BackendFeature, KernelError, Status, VhostVdpa
from pyvhostvdpa.net.features import Feature

STARTED = Status.ACKNOWLEDGE | Status.DRIVER
READY = STARTED | Status.FEATURES_OK
FEATURES = int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
Act = Callable[[VhostVdpa], object]


class Case(NamedTuple):
    """``errno`` 0 for one that succeeds. ``kind`` of device: sim, sim_dma, vduse. ``owned``: after set_owner()."""

    ioctl: str
    what: str
    act: Act
    errno: int = 0
    kind: str = "sim"
    owned: bool = True


CASES: list[Case] = []


def case(ioctl: str, what: str, act: Act, number: int = 0, kind: str = "sim", owned: bool = True) -> None:
    CASES.append(Case(ioctl, what, act, number, kind, owned))


@contextmanager
def eventfd():  # type: ignore[no-untyped-def]
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def with_eventfd(setter: str, *arguments: int) -> Act:
    def act(dev: VhostVdpa) -> None:
        with eventfd() as fd:
            getattr(dev, setter)(*arguments, fd)
            getattr(dev, setter)(*arguments, -1)

    return act


def same(got: object, expected: object) -> None:
    assert got == expected


def negotiate(dev: VhostVdpa) -> None:
    dev.set_status(STARTED)
    dev.set_features(FEATURES)
    dev.set_status(READY)


def start(dev: VhostVdpa) -> None:
    """DRIVER_OK without a single queue enabled: the device runs and touches nothing."""
    negotiate(dev)
    dev.set_status(READY | Status.DRIVER_OK)


def null(ioctl: str) -> Act:
    return lambda dev: dev.request(ioctl, None)


def after(prepare: Act, act: Act) -> Act:
    def both(dev: VhostVdpa) -> None:
        prepare(dev)
        act(dev)

    return both


# -- ownership -----------------------------------------------------------------
case("VHOST_SET_OWNER", "of a device that has none", lambda d: d.set_owner(), owned=False)
case("VHOST_SET_OWNER", "twice", lambda d: d.set_owner(), errno.EBUSY)
case("VHOST_SET_MEM_TABLE", "empty", lambda d: d.set_mem_table())
case("VHOST_SET_MEM_TABLE", "with padding", lambda d: d.request("VHOST_SET_MEM_TABLE", b"\0\0\0\0\1"), errno.EOPNOTSUPP)
case("VHOST_SET_MEM_TABLE", "without owner", lambda d: d.set_mem_table(), errno.EPERM, owned=False)
case(
    "VHOST_SET_FORK_FROM_OWNER",
    "either way",
    lambda d: [(d.set_fork_from_owner(v), same(d.get_fork_from_owner(), v)) for v in (False, True)],
    owned=False,
)
case("VHOST_SET_FORK_FROM_OWNER", "after set_owner", lambda d: d.set_fork_from_owner(True), errno.EBUSY)
case(
    "VHOST_SET_FORK_FROM_OWNER",
    "to 2",
    lambda d: d.request("VHOST_SET_FORK_FROM_OWNER", b"\2"),
    errno.EINVAL,
    owned=False,
)
case("VHOST_GET_FORK_FROM_OWNER", "as the module parameter has it", lambda d: d.get_fork_from_owner())
case("VHOST_GET_FORK_FROM_OWNER", "to nowhere", null("VHOST_GET_FORK_FROM_OWNER"), errno.EFAULT)

# -- what is never served ---------------------------------------------------------
case("VHOST_RESET_OWNER", "at all", lambda d: d.request("VHOST_RESET_OWNER"), errno.EFAULT)
for name in (
    "VHOST_SET_LOG_BASE",
    "VHOST_SET_LOG_FD",
    "VHOST_NEW_WORKER",
    "VHOST_FREE_WORKER",
    "VHOST_ATTACH_VRING_WORKER",
    "VHOST_GET_VRING_WORKER",
    "VHOST_GET_FEATURES_ARRAY",
    "VHOST_SET_FEATURES_ARRAY",
):
    case(name, "at all", lambda d, name=name: d.request(name), errno.ENOTTY)  # type: ignore[misc]
    if not name.startswith("VHOST_SET_LOG_"):
        case(name, "with a count taken for an index", lambda d, name=name: d.request(name, b"\3"), errno.ENOBUFS)  # type: ignore[misc]

# -- features and status -------------------------------------------------------------
case("VHOST_GET_FEATURES", "of the device", lambda d: same(d.get_features() & FEATURES, FEATURES), owned=False)
case("VHOST_GET_FEATURES", "to nowhere", null("VHOST_GET_FEATURES"), errno.EFAULT)
case("VHOST_SET_FEATURES", "that it offers", negotiate)
case("VHOST_SET_FEATURES", "after FEATURES_OK", after(negotiate, lambda d: d.set_features(FEATURES)), errno.EBUSY)
case("VHOST_SET_FEATURES", "without ACCESS_PLATFORM", lambda d: d.set_features(int(Feature.VERSION_1)), errno.EINVAL)
case("VHOST_GET_BACKEND_FEATURES", "of kernel and parent", lambda d: d.get_backend_features(), owned=False)
case("VHOST_GET_BACKEND_FEATURES", "to nowhere", null("VHOST_GET_BACKEND_FEATURES"), errno.EFAULT)
case("VHOST_SET_BACKEND_FEATURES", "all advertised", lambda d: d.set_backend_features(d.get_backend_features()))
case(
    "VHOST_SET_BACKEND_FEATURES",
    "an unknown bit",
    lambda d: d.set_backend_features(BackendFeature(1 << 20)),
    errno.EOPNOTSUPP,
)
case(
    "VHOST_SET_BACKEND_FEATURES",
    "DESC_ASID alone",
    lambda d: d.set_backend_features(BackendFeature.DESC_ASID),
    errno.EINVAL,
)
case(
    "VHOST_SET_BACKEND_FEATURES",
    "DESC_ASID of a parent without descriptor groups",
    lambda d: d.set_backend_features(BackendFeature.DESC_ASID | BackendFeature.IOTLB_ASID),
    errno.EOPNOTSUPP,
)
case("VHOST_VDPA_GET_DEVICE_ID", "net", lambda d: same(d.get_device_id(), 1), owned=False)
case("VHOST_VDPA_GET_DEVICE_ID", "to nowhere", null("VHOST_VDPA_GET_DEVICE_ID"), errno.EFAULT)
case("VHOST_VDPA_GET_STATUS", "after opening", lambda d: same(d.get_status(), Status(0)), owned=False)
case("VHOST_VDPA_GET_STATUS", "to nowhere", null("VHOST_VDPA_GET_STATUS"), errno.EFAULT)
case("VHOST_VDPA_SET_STATUS", "step by step", after(negotiate, lambda d: same(d.get_status(), READY)))
case(
    "VHOST_VDPA_SET_STATUS",
    "that clears a bit",
    after(negotiate, lambda d: d.set_status(Status.ACKNOWLEDGE)),
    errno.EINVAL,
)
case("VHOST_VDPA_SUSPEND", "a device that runs", after(start, lambda d: d.suspend()))
case("VHOST_VDPA_SUSPEND", "a parent that cannot", after(start, lambda d: d.suspend()), errno.EOPNOTSUPP, "vduse")
case("VHOST_VDPA_RESUME", "a suspended device", lambda d: (start(d), d.suspend(), d.resume()))
case("VHOST_VDPA_RESUME", "a parent that cannot", after(start, lambda d: d.resume()), errno.EOPNOTSUPP, "vduse")

# -- configuration space -------------------------------------------------------------
case("VHOST_VDPA_GET_CONFIG_SIZE", "of a net device", lambda d: same(d.get_config_size() >= 12, True))
case("VHOST_VDPA_GET_CONFIG_SIZE", "to nowhere", null("VHOST_VDPA_GET_CONFIG_SIZE"), errno.EFAULT)
case("VHOST_VDPA_GET_CONFIG", "the MAC address", lambda d: same(len(d.get_config(0, 6)), 6))
case("VHOST_VDPA_GET_CONFIG", "beyond its end", lambda d: d.get_config(d.get_config_size(), 4), errno.EINVAL)
case("VHOST_VDPA_GET_CONFIG", "of no length", lambda d: d.get_config(0, 0), errno.EINVAL)
case("VHOST_VDPA_SET_CONFIG", "its own MAC address", lambda d: d.set_config(0, d.get_config(0, 6)))
case("VHOST_VDPA_SET_CONFIG", "beyond its end", lambda d: d.set_config(d.get_config_size(), b"\0"), errno.EINVAL)
case("VHOST_VDPA_SET_CONFIG", "of no length", lambda d: d.set_config(0, b""), errno.EINVAL)
case("VHOST_VDPA_SET_CONFIG_CALL", "an eventfd and none", with_eventfd("set_config_call"))
case("VHOST_VDPA_SET_CONFIG_CALL", "no eventfd", lambda d: d.set_config_call(0), errno.EINVAL)
case("VHOST_VDPA_SET_CONFIG_CALL", "a closed descriptor", lambda d: d.set_config_call(999), errno.EBADF)

# -- virtqueues -----------------------------------------------------------------------
case("VHOST_VDPA_GET_VQS_COUNT", "control queue included", lambda d: same(d.get_vqs_count(), 3), owned=False)
case("VHOST_VDPA_GET_VQS_COUNT", "to nowhere", null("VHOST_VDPA_GET_VQS_COUNT"), errno.EFAULT)
case("VHOST_VDPA_GET_VRING_NUM", "the most", lambda d: same(d.get_vring_num(), 256), owned=False)
case("VHOST_VDPA_GET_VRING_NUM", "to nowhere", null("VHOST_VDPA_GET_VRING_NUM"), errno.EFAULT)
case("VHOST_VDPA_GET_VRING_SIZE", "of a parent with dma_map", lambda d: same(d.get_vring_size(0), 256), 0, "sim_dma")
case("VHOST_VDPA_GET_VRING_SIZE", "of a parent with set_map", lambda d: d.get_vring_size(0), errno.EOPNOTSUPP)
case("VHOST_SET_VRING_NUM", "a power of two", lambda d: d.set_vring_num(0, 64))
case("VHOST_SET_VRING_NUM", "3", lambda d: d.set_vring_num(0, 3), errno.EINVAL)
case("VHOST_SET_VRING_NUM", "of a queue it has not", lambda d: d.set_vring_num(3, 16), errno.ENOBUFS)
case("VHOST_SET_VRING_NUM", "without owner", lambda d: d.set_vring_num(0, 64), errno.EPERM, owned=False)
case("VHOST_SET_VRING_BASE", "within 16 bits", lambda d: (d.set_vring_base(1, 7), same(d.get_vring_base(1), 7)))
case("VHOST_SET_VRING_BASE", "beyond 16 bits", lambda d: d.set_vring_base(0, 1 << 16), errno.EINVAL)
case("VHOST_SET_VRING_BASE", "while it runs", after(start, lambda d: d.set_vring_base(0, 1)), errno.EINVAL)
case("VHOST_GET_VRING_BASE", "at the start", lambda d: same(d.get_vring_base(0), 0))
case("VHOST_GET_VRING_BASE", "of a queue it has not", lambda d: d.get_vring_base(3), errno.ENOBUFS)
case("VHOST_SET_VRING_ADDR", "aligned", lambda d: d.set_vring_addr(0, 0x1000, 0x2002, 0x3004))
case("VHOST_SET_VRING_ADDR", "used unaligned", lambda d: d.set_vring_addr(0, 0x1000, 0x2000, 0x3002), errno.EINVAL)
case("VHOST_SET_VRING_ADDR", "avail unaligned", lambda d: d.set_vring_addr(0, 0x1000, 0x2001, 0x3000), errno.EINVAL)
case(
    "VHOST_SET_VRING_ADDR",
    "with an unknown flag",
    lambda d: d.request("VHOST_SET_VRING_ADDR", b"\0\0\0\0\2"),
    errno.EOPNOTSUPP,
)
case(
    "VHOST_SET_VRING_ADDR",
    "while it runs",
    after(start, lambda d: d.set_vring_addr(0, 0x1000, 0x2000, 0x3000)),
    errno.EINVAL,
)
for setter in ("kick", "call", "err"):
    name = f"VHOST_SET_VRING_{setter.upper()}"
    method = f"set_vring_{setter}"
    case(name, "an eventfd and none", with_eventfd(method, 0))
    case(name, "no eventfd", lambda d, method=method: getattr(d, method)(0, 0), errno.EINVAL)  # type: ignore[misc]
    case(name, "a closed descriptor", lambda d, method=method: getattr(d, method)(0, 999), errno.EBADF)  # type: ignore[misc]
    case(name, "of a queue it has not", lambda d, method=method: getattr(d, method)(3, -1), errno.ENOBUFS)  # type: ignore[misc]
case("VHOST_VDPA_SET_VRING_ENABLE", "on and off", lambda d: [d.set_vring_enable(0, on) for on in (True, False)])
case("VHOST_VDPA_SET_VRING_ENABLE", "a queue it has not", lambda d: d.set_vring_enable(3, True), errno.ENOBUFS)
case(
    "VHOST_SET_VRING_BUSYLOOP_TIMEOUT",
    "kept",
    lambda d: (d.set_vring_busyloop_timeout(0, 50), same(d.get_vring_busyloop_timeout(0), 50)),
)
case(
    "VHOST_SET_VRING_BUSYLOOP_TIMEOUT",
    "of a queue it has not",
    lambda d: d.set_vring_busyloop_timeout(3, 1),
    errno.ENOBUFS,
)
case("VHOST_GET_VRING_BUSYLOOP_TIMEOUT", "none at first", lambda d: same(d.get_vring_busyloop_timeout(0), 0))
case(
    "VHOST_GET_VRING_BUSYLOOP_TIMEOUT",
    "without owner",
    lambda d: d.get_vring_busyloop_timeout(0),
    errno.EPERM,
    owned=False,
)
case("VHOST_SET_VRING_ENDIAN", "on a kernel without", lambda d: d.set_vring_endian(0, True), errno.ENOTTY)
case("VHOST_GET_VRING_ENDIAN", "on a kernel without", lambda d: d.get_vring_endian(0), errno.ENOTTY)

# -- groups and address spaces ---------------------------------------------------------
case("VHOST_VDPA_GET_IOVA_RANGE", "all of it", lambda d: same(d.get_iova_range(), (0, (1 << 64) - 1)), owned=False)
case("VHOST_VDPA_GET_IOVA_RANGE", "to nowhere", null("VHOST_VDPA_GET_IOVA_RANGE"), errno.EFAULT)
case("VHOST_VDPA_GET_GROUP_NUM", "data and control", lambda d: same(d.get_group_num(), 2), owned=False)
case("VHOST_VDPA_GET_GROUP_NUM", "to nowhere", null("VHOST_VDPA_GET_GROUP_NUM"), errno.EFAULT)
case("VHOST_VDPA_GET_AS_NUM", "two", lambda d: same(d.get_as_num(), 2), owned=False)
case("VHOST_VDPA_GET_AS_NUM", "to nowhere", null("VHOST_VDPA_GET_AS_NUM"), errno.EFAULT)
case("VHOST_VDPA_GET_VRING_GROUP", "each", lambda d: same([d.get_vring_group(i) for i in range(3)], [0, 0, 1]))
case("VHOST_VDPA_GET_VRING_GROUP", "of a queue it has not", lambda d: d.get_vring_group(3), errno.ENOBUFS)
case("VHOST_VDPA_GET_VRING_GROUP", "without owner", lambda d: d.get_vring_group(0), errno.EPERM, owned=False)
case("VHOST_VDPA_GET_VRING_DESC_GROUP", "of a parent without", lambda d: d.get_vring_desc_group(0), errno.EOPNOTSUPP)
case("VHOST_VDPA_SET_GROUP_ASID", "of the control queue's own group", lambda d: d.set_group_asid(1, 1))
case("VHOST_VDPA_SET_GROUP_ASID", "an address space it has not", lambda d: d.set_group_asid(1, 12345), errno.EINVAL)
case("VHOST_VDPA_SET_GROUP_ASID", "a group it has not", lambda d: d.set_group_asid(2, 0), errno.EINVAL)
case("VHOST_VDPA_SET_GROUP_ASID", "a group beyond the queues", lambda d: d.set_group_asid(3, 0), errno.ENOBUFS)


def errno_of(act: Callable[[], object]) -> int:
    """What the kernel answers: 0, or the errno. For behaviour that kernels do not agree on."""
    try:
        act()
    except KernelError as e:
        return e.errno or 0
    return 0
