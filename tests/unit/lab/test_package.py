"""The packages are made of what the source distribution has, by the Python of the machine."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from labkit.package import Packager


class Packed(Packager):
    """With a source distribution that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sdist(self) -> list[Path]:
        (self._folder / "project-1").mkdir()
        (self._folder / "project-1" / "README.md").write_text("it\n")
        archive = self._folder / "project-1.tar.gz"
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(self._folder / "project-1", "project-1")
        return [archive]


@pytest.mark.parametrize("old", [False, True], ids=["with filters", "Debian 12, Python 3.11.2"])
def test_a_source_distribution_is_unpacked(old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if old:
        monkeypatch.delattr(tarfile, "data_filter")
        monkeypatch.setattr(shutil, "unpack_archive", lambda filename, extract_dir: None)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert (Packed(tmp_path)._unpacked(scratch) / "README.md").read_text() == "it\n"
