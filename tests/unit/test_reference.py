"""The pages and references that `vhost-vdpa help` prints."""

from __future__ import annotations

import errno
import re

import pytest

import pyvhostvdpa
from pyvhostvdpa.base.errors import KernelError, MissingFeature
from pyvhostvdpa.base.uapi import IOCTLS
from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.cli import main, reference


def test_every_topic_has_a_page_and_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    for topic, title in reference.topics().items():
        assert title
        assert topic in listed
        assert len(reference.text(topic)) > 200


def test_an_unknown_topic_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "weather"]) == 1
    assert f"one of: {', '.join(reference.topics())}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in pyvhostvdpa.__all__ if not n.startswith("_")])
def test_public_name_has_a_reference(name: str) -> None:
    assert name in reference.text("api", name)


def test_reference_has_no_text_that_only_a_program_can_read() -> None:
    for module in reference.modules():
        for name, thing in reference.public(module):
            page = "\n".join(reference.describe(name, thing, module.__name__))
            assert not re.search(r"<(function|class|factory)|<\w+\.\w+:| at 0x[0-9a-f]{6}|:\w+:`", page), name


def test_default_value_is_written_as_a_caller_would_write_it() -> None:
    assert "perm: Access = Access.RW)" in reference.text("api", "AddressSpace").replace("\n ", "")
    assert 'impossible: str = "")' in reference.text("api", "RowResult")
    assert "progress: ProgressCallback = …" in reference.text("api", "GuestMemory")


def test_a_class_is_reported_with_its_methods() -> None:
    page = reference.text("api", "VhostVdpa")
    assert "set_group_asid(self, group: int, asid: int) -> None" in page
    assert "EBUSY after DRIVER_OK" in page
    with pytest.raises(MissingFeature, match="nothing public"):
        reference.text("api", "Nonsense")


def test_a_class_is_reported_with_what_it_has_from_another() -> None:
    page = reference.text("api", "SharedMemory")
    assert "buffer" in page
    assert "hva" in page
    assert page.count(" close(self)") == 1
    assert "__enter__" not in page


def test_the_table_of_requests_names_the_method_of_each() -> None:
    page = reference.text("ioctls")
    assert all(name in page for name in IOCTLS)
    assert all(callable(getattr(VhostVdpa, row.method)) for row in IOCTLS.values())


def test_an_errno_is_reported_with_its_cause_and_the_next_step() -> None:
    error = KernelError(524, "mmap", "index=0")
    assert "ENOTSUPP" in str(error)
    assert "no doorbell page" in error.cause
    assert error.hint
    assert "no such virtqueue" in KernelError(errno.ENOBUFS, "VHOST_SET_VRING_NUM", "index=9 num=1").cause
    assert "below the number of virtqueues" in KernelError(errno.ENOBUFS, "VHOST_VDPA_SET_GROUP_ASID").cause
    assert "since 6.7" in KernelError(errno.ENOTTY, "VHOST_VDPA_GET_VRING_DESC_GROUP").cause
    assert "logs no dirty pages" in KernelError(errno.ENOTTY, "VHOST_SET_LOG_BASE").cause
    assert "udev rule" in KernelError(errno.EACCES, "open", "/dev/vhost-vdpa-0").hint


def test_a_cause_that_the_caller_knows_comes_first() -> None:
    assert KernelError(errno.EBUSY, "open", cause="held by pid 7").cause == "held by pid 7"
