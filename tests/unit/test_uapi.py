"""Numbers and layouts, by a second source: the compiler and the kernel's own header.

Installed headers may be older than what the package knows. They then count for
all that they define; ``later_vhost.h`` has the rest in the kernel's terms, and a
test checks that nothing is taken from it that these headers should have.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base import uapi

STRUCTS = {
    "struct vhost_vring_state": uapi.VringState,
    "struct vhost_vring_file": uapi.VringFile,
    "struct vhost_vring_addr": uapi.VringAddr,
    "struct vhost_vdpa_iova_range": uapi.IovaRange,
}
OPEN_ENDED = {
    "struct vhost_memory": uapi.VhostMemory,
    "struct vhost_vring_worker": uapi.VringWorker,
    "struct vhost_worker_state": uapi.WorkerState,
    "struct vhost_features_array": uapi.FeaturesArray,
}
OTHERS = ("VHOST_NET_", "VHOST_SCSI_", "VHOST_VSOCK_")
HEADER = Path("/usr/include/linux/vhost.h")
LATER = Path(__file__).with_name("later_vhost.h")

MESSAGE_FIELDS = ("iova", "size", "uaddr", "perm", "type")


def compiled(tmp_path: Path, expressions: list[str]) -> list[int]:
    """Values of C expressions, as the compiler sees the kernel's header."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler, which reads the kernel's header, is not installed")
    prints = "\n".join(f'printf("%llu\\n", (unsigned long long)({e}));' for e in expressions)
    source = tmp_path / "values.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/version.h>\n#include <linux/vhost.h>\n"
        "#include <linux/virtio_ring.h>\n#include <linux/virtio_net.h>\n"
        f'#include "{LATER}"\nint main(void) {{\n{prints}\nreturn 0;\n}}\n'
    )
    program = tmp_path / "values"
    subprocess.run(["cc", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


def in_the_header() -> list[str]:
    """The requests of the installed header, but those of other vhost drivers."""
    if not HEADER.exists():
        pytest.skip(f"{HEADER}, the kernel's header, is not installed")
    return requests_of(HEADER)


def requests_of(header: Path) -> list[str]:
    found = re.findall(r"^#define\s+(VHOST_\w+)\s+_IO[RW]*\(", header.read_text(), re.MULTILINE)
    return [name for name in found if not name.startswith(OTHERS)]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_every_request_of_the_header_is_known() -> None:
    assert set(in_the_header()) <= set(uapi.IOCTLS)


def test_requests_that_the_header_lacks_are_of_a_later_kernel(tmp_path: Path) -> None:
    [code] = compiled(tmp_path, ["LINUX_VERSION_CODE"])
    headers = (code >> 16, code >> 8 & 0xFF)
    lacking = set(uapi.IOCTLS) - set(in_the_header())
    assert lacking <= set(requests_of(LATER))
    assert [name for name in lacking if version(uapi.IOCTLS[name].since) <= headers] == []


def test_ioctl_numbers_are_the_kernels(tmp_path: Path) -> None:
    names = list(uapi.IOCTLS)
    assert dict(zip(names, compiled(tmp_path, names), strict=True)) == {
        name: uapi.IOCTLS[name].request for name in names
    }


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_fixed_parts_are_the_kernels(tmp_path: Path, name: str) -> None:
    assert compiled(tmp_path, [f"sizeof({name})"]) == [ctypes.sizeof(OPEN_ENDED[name])]


@pytest.mark.parametrize("name", STRUCTS)
def test_argument_layouts_are_the_kernels(tmp_path: Path, name: str) -> None:
    ours = STRUCTS[name]
    fields = [field[0] for field in ours._fields_]
    values = compiled(tmp_path, [f"sizeof({name})", *(f"offsetof({name}, {field})" for field in fields)])
    assert values == [ctypes.sizeof(ours), *(getattr(ours, field).offset for field in fields)]
    assert values == [ffi.sizeof(name), *(ffi.offsetof(name, field) for field in fields)]


def test_the_message_is_the_kernels(tmp_path: Path) -> None:
    ours, iotlb = "struct vhost_msg_v2", "struct vhost_iotlb_msg"
    values = compiled(
        tmp_path,
        [f"sizeof({ours})", f"offsetof({ours}, asid)", f"offsetof({ours}, iotlb)", f"sizeof({iotlb})"]
        + [f"offsetof({iotlb}, {field})" for field in MESSAGE_FIELDS],
    )
    assert values[0] == uapi.MESSAGE_SIZE == ffi.sizeof(ours)
    assert values[1:] == [
        ffi.offsetof(ours, "asid"),
        ffi.offsetof(ours, "iotlb"),
        ffi.sizeof(iotlb),
        *(ffi.offsetof(iotlb, field) for field in MESSAGE_FIELDS),
    ]


def test_ring_layouts_are_the_kernels(tmp_path: Path) -> None:
    offsets = [
        ("struct vring_desc", "next"),
        ("struct vring_avail", "ring"),
        ("struct vring_used", "ring"),
        ("struct virtio_net_hdr_v1", "num_buffers"),
    ]
    values = compiled(tmp_path, [f"offsetof({s}, {f})" for s, f in offsets])
    assert values == [ffi.offsetof(s, f) for s, f in offsets]


def test_constants_of_the_message_path_are_the_kernels(tmp_path: Path) -> None:
    header = (Path(__file__).parents[2] / "cdefs" / "vhost.h").read_text()
    names = re.findall(r"#define\s+(VHOST_\w+)\s+\d+", header)
    assert len(names) > 8
    assert compiled(tmp_path, names) == [getattr(lib, name) for name in names]


def test_flags_are_the_kernels(tmp_path: Path) -> None:
    values = compiled(tmp_path, [f"1ull << VHOST_BACKEND_F_{flag.name}" for flag in uapi.BackendFeature])
    assert values == [flag.value for flag in uapi.BackendFeature]


def test_unknown_bits_are_named_by_number() -> None:
    assert uapi.names(uapi.BackendFeature(1 << 4 | 1 << 20)) == "SUSPEND bit 20"
    assert uapi.names(uapi.BackendFeature(0)) == "none"
