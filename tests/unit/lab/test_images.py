"""Images and the cpio archive."""

import shutil
import struct
import subprocess

import pytest

from labkit import images, kernel
from labkit.images import Cpio
from labkit.progress import Progress


def test_cpio_is_read_by_another_program(tmp_path):
    cpio = Cpio()
    cpio.folder("d")
    cpio.file("d/f", b"hello", executable=True)
    cpio.file("empty", b"")
    cpio.link("l", "d/f")
    archive = cpio.finish()
    assert len(archive) % 512 == 0
    subprocess.run(["busybox", "cpio", "-id"], input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "l").read_bytes() == b"hello"
    assert (tmp_path / "d/f").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""


def test_image_is_large_enough(tmp_path, cache):
    folder = tmp_path / "folder"
    for number in range(300):
        (folder / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (folder / f"d{number % 7}/f{number}").write_bytes(b"x" * number * 100)
    image = tmp_path / "x.img"
    images.make_image(cache, Progress(), folder, image, "writing")
    assert image.stat().st_size % (1 << 20) == 0
    check = shutil.which("e2fsck", path="/sbin:/usr/sbin")
    assert check
    subprocess.run([check, "-fn", str(image)], check=True, capture_output=True)


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
