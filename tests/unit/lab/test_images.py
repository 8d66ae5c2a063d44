"""Images and the cpio archive."""

import shutil
import struct
import subprocess

import pytest

from labkit import images, kernel
from labkit.images import Cpio
from labkit.progress import Progress

CHECK = shutil.which("e2fsck", path="/sbin:/usr/sbin")


def entries(archive):
    """Name, mode and content of each entry, by cpio(5)'s "New ASCII Format"."""
    found, at = [], 0
    while not found or found[-1][0] != "TRAILER!!!":
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, named = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + named]
        assert name.endswith(b"\0")
        data = -(-(at + 110 + named) // 4) * 4
        found.append((name[:-1].decode(), mode, archive[data : data + size]))
        at = -(-(data + size) // 4) * 4
    return found


def small_archive():
    cpio = Cpio()
    cpio.folder("d")
    cpio.file("d/f", b"hello", executable=True)
    cpio.file("empty", b"")
    cpio.link("l", "d/f")
    return cpio.finish()


def test_cpio_has_the_new_ascii_format():
    archive = small_archive()
    assert len(archive) % 512 == 0
    assert entries(archive) == [
        ("d", 0o40755, b""),
        ("d/f", 0o100755, b"hello"),
        ("empty", 0o100644, b""),
        ("l", 0o120777, b"d/f"),
        ("TRAILER!!!", 0, b""),
    ]


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed")
def test_cpio_is_read_by_busybox(tmp_path):
    subprocess.run(["busybox", "cpio", "-id"], input=small_archive(), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "l").read_bytes() == b"hello"
    assert (tmp_path / "d/f").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.skipif(CHECK is None, reason="e2fsprogs is not installed")
def test_image_is_large_enough(tmp_path, cache):
    folder = tmp_path / "folder"
    for number in range(300):
        (folder / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (folder / f"d{number % 7}/f{number}").write_bytes(b"x" * number * 100)
    image = tmp_path / "x.img"
    images.make_image(cache, Progress(), folder, image, "writing")
    assert image.stat().st_size % (1 << 20) == 0
    subprocess.run([CHECK, "-fn", str(image)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("magic", "kind", "trailer"), [(b"\x28\xb5\x2f\xfd", "zstd", 4), (b"\xfd7zXZ", "xz", 4), (b"\x1f\x8b", "gzip", 0)]
)
def test_payload_of_a_kernel_image(magic, kind, trailer):
    payload = magic + b"data"
    image = bytearray(2048)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 16, len(payload) + trailer)
    image[1024 + 16 : 1024 + 16 + len(payload)] = payload
    assert kernel.kernel_payload(bytes(image)) == (kind, payload)


def test_no_payload_in_something_else():
    assert kernel.kernel_payload(bytes(4096)) == ("", b"")


def test_modules_are_loaded_after_what_they_need():
    dependencies = kernel.parse_dependencies(
        "kernel/a.ko: kernel/b-x.ko.xz kernel/c.ko\nkernel/b-x.ko.xz: kernel/c.ko\nkernel/c.ko:\nkernel/z.ko:\n"
    )
    assert kernel.load_order(dependencies, ("a", "b_x", "built_in")) == [
        "kernel/c.ko",
        "kernel/b-x.ko.xz",
        "kernel/a.ko",
    ]
