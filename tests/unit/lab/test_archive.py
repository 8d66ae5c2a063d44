"""The choice of a kernel from the text of a package index."""

import pytest

from labkit import archive
from labkit.errors import LabError

INDEX = """\
Package: linux-image-6.12.100+deb13-amd64
Version: 6.12.100-1
Depends: kmod, initramfs-tools (>= 0.120) | linux-initramfs-tool
Size: 100

Package: linux-headers-6.12.100+deb13-amd64
Version: 6.12.100-1
Depends: linux-base (>= 4.12~), linux-headers-6.12.100+deb13-common (= 6.12.100-1), linux-kbuild-6.12.100+deb13, gcc-14
Size: 10

Package: linux-headers-6.12.100+deb13-common
Version: 6.12.100-1
Size: 20

Package: linux-kbuild-6.12.100+deb13
Version: 6.12.100-1
Depends: libc6 (>= 2.38), pahole
Size: 30

Package: linux-source-6.12
Version: 6.12.100-1
Depends: binutils, xz-utils
Size: 1000

Package: linux-image-6.12.117+deb13-amd64
Version: 6.12.117-1
Depends: kmod
Size: 1

Package: linux-image-6.12.117+deb13-cloud-amd64
Version: 6.12.117-1
Size: 1

Package: linux-image-7.2.12+deb13-amd64
Version: 7.2.12-1~bpo13+1
Depends: dracut | initramfs-tools, linux-base-7.2.12+deb13-amd64 (= 7.2.12-1~bpo13+1),\
 linux-binary-7.2.12+deb13-amd64 (= 7.2.12-1~bpo13+1), linux-modules-7.2.12+deb13-amd64 (= 7.2.12-1~bpo13+1)

Package: linux-base-7.2.12+deb13-amd64
Version: 7.2.12-1~bpo13+1

Package: linux-binary-7.2.12+deb13-amd64
Version: 7.2.12-1~bpo13+1

Package: linux-modules-7.2.12+deb13-amd64
Version: 7.2.12-1~bpo13+1
Depends: kmod

Package: linux-headers-7.2.12+deb13-amd64
Version: 7.2.12-1~bpo13+1
Depends: gcc-14-for-host, linux-base-7.2.12+deb13-amd64 (= 7.2.12-1~bpo13+1)

Package: linux-source-7.2
Version: 7.2.12-1~bpo13+1
"""


def choose(wanted):
    return archive.choose_kernel(archive.parse_index(INDEX), wanted)


def names(packages):
    return [package.name for package in packages]


def test_newest_kernel_with_all_its_parts():
    choice = choose("6.12")
    assert choice.release == "6.12.100+deb13-amd64"
    assert names(choice.image) == ["linux-image-6.12.100+deb13-amd64"]
    assert names(choice.headers) == [
        "linux-headers-6.12.100+deb13-amd64",
        "linux-headers-6.12.100+deb13-common",
        "linux-kbuild-6.12.100+deb13",
    ]
    assert choice.source.pin == "linux-source-6.12=6.12.100-1"
    assert choice.tools == ("gcc-14", "libc6", "pahole")
    assert choice.download == 1160


def test_image_split_into_several_packages():
    choice = choose("7.2")
    assert set(names(choice.image)) == {
        "linux-image-7.2.12+deb13-amd64",
        "linux-base-7.2.12+deb13-amd64",
        "linux-binary-7.2.12+deb13-amd64",
        "linux-modules-7.2.12+deb13-amd64",
    }
    assert choice.tools == ("gcc-14-for-host",)


def test_latest():
    assert choose("latest").release == "7.2.12+deb13-amd64"


@pytest.mark.parametrize("wanted", ["6.1", "6.12.117", "5", "7.20"])
def test_no_kernel_fits(wanted):
    with pytest.raises(LabError) as caught:
        choose(wanted)
    assert "6.12, 7.2" in caught.value.why


@pytest.mark.parametrize(
    ("release", "wanted", "expected"),
    [
        ("6.12.117+deb13-amd64", "6.12", True),
        ("6.12.117+deb13-amd64", "6.12.117", True),
        ("6.12.117+deb13-amd64", "6.12.11", False),
        ("6.12.117+deb13-amd64", "6.1", False),
        ("6.12.117+deb13-amd64", "6.12.117+deb13-amd64", True),
    ],
)
def test_prefix_ends_where_a_number_ends(release, wanted, expected):
    assert archive.fits(release, wanted) is expected


def test_order_is_by_numbers():
    assert archive.order("6.12.9-1") < archive.order("6.12.10-1") < archive.order("6.12.10-2")
