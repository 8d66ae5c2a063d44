"""`tools/package`: what is handed on, each by one command, built in a Debian tree of the lab's cache."""

import argparse
import re
import shutil
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from labkit import host
from labkit.bare import BUILDING, BareTree
from labkit.errors import LabError
from labkit.session import PROJECT, Session
from labkit.tree import LOCK

IGNORED = (
    "__pycache__",
    ".git",
    "build",
    "dist",
    "out",
    "*.so",
    "*.o",
    "*.pyc",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)
MACHINES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
# The glibc that threads are in without a library of their own; every distribution with a Python for this package has
# it (Debian 12, RHEL 9, Ubuntu 24.04). auditwheel names the wheel by the oldest one that it runs with, and a wheel
# that needs a newer one than this does not have the name that is expected.
POLICY = "manylinux_2_34"
_WHEEL = """
cd /lab/source
python3 -m pip wheel --no-deps --no-build-isolation --no-index --no-cache-dir --disable-pip-version-check \\
    --wheel-dir /lab/raw .
auditwheel repair --plat auto --wheel-dir /lab/out /lab/raw/*.whl
auditwheel show /lab/out/*{policy}_{machine}*.whl
"""
_CROSS = """
export CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared" AR=aarch64-linux-gnu-ar
export _PYTHON_HOST_PLATFORM=linux-aarch64 _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__aarch64-linux-gnu
"""
_DEB = """
cd /lab/build
wheel=$(ls /lab/pypi/ioctl_opt-*.whl)
mkdir ioctl-opt && python3 -m zipfile -e "$wheel" ioctl-opt
cp -r /lab/source/tools/packaging/ioctl-opt ioctl-opt/debian
(cd ioctl-opt && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps)
apt-get install ./python3-ioctl-opt_*.deb
cp -r /lab/source pyvhostvdpa && cp -r pyvhostvdpa/tools/packaging/debian pyvhostvdpa/debian
(cd pyvhostvdpa && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps)
lintian --allow-root --fail-on error ./*.changes
cp ./*.deb /lab/out
"""
_SITE = """
cd /lab/source
python3 -m pip install --no-deps --no-build-isolation --no-index --no-cache-dir --quiet --target /lab/build/package .
python3 -m zipfile -e "$(ls /lab/pypi/ioctl_opt-*.whl)" /lab/build/package
COLUMNS=100 PYTHONPATH=/lab/build/package python3 tools/packaging/site.py /lab/build/pages
python3 -m sphinx -W --keep-going -q -j auto -b html /lab/build/pages /lab/out/site
"""
_SDIST = """
cd /lab/source
PYTHONPATH=cdefs python3 -c 'import backend; print(backend.build_sdist("/lab/out"))'
"""


def version() -> str:
    """Return the project's version."""
    return str(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"])


class Packager:
    """The tree with the tools, and the folder that what is made goes to."""

    def __init__(self, session: Session, out: Path) -> None:
        self.session = session
        self.out = out
        self.tree = BareTree(session.cache, session.progress, BUILDING)

    def set_up(self) -> None:
        """Make the tree unless it is there."""
        host.check_machine("setup")
        with self.session.cache.setting_up():
            host.ensure_packages(self.session.cache, self.session.progress)
            self.tree.ensure()

    def sdist(self) -> list[Path]:
        """Make the source distribution."""
        return self._make("source distribution", _SDIST, [f"pyvhostvdpa-{version()}.tar.gz"])

    def wheels(self, machines: Sequence[str]) -> list[Path]:
        """Make a wheel for each machine, from the source distribution, and audit it."""
        made = []
        for machine in machines:
            script = (_CROSS if machine == "aarch64" else "") + _WHEEL.format(policy=POLICY, machine=machine)
            name = f"pyvhostvdpa-{version()}-cp311-abi3-*{POLICY}_{machine}*.whl"
            made += self._make(f"wheel for {machine}", script, [name], from_sdist=True)
        return made

    def debs(self) -> list[Path]:
        """Make the Debian packages, and have lintian look at them."""
        names = ["python3-ioctl-opt_*_all.deb", f"python3-pyvhostvdpa_{version()}-*_amd64.deb"]
        return self._make("Debian packages", _DEB, names, from_sdist=True)

    def site(self) -> list[Path]:
        """Make the documentation as a site; a dead link in it is an error."""
        return self._make("site", _SITE, ["site"], from_sdist=True)

    def _make(self, what: str, script: str, names: Sequence[str], from_sdist: bool = False) -> list[Path]:
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.session.cache.bare, prefix="work-") as scratch:
            folders = {name: Path(scratch, name) for name in ("out", "raw", "build", "pypi")}
            for folder in folders.values():
                folder.mkdir()
            source = self._unpacked(Path(scratch)) if from_sdist else self._copied(Path(scratch))
            if "ioctl" in script:
                self._fetch_ioctl_opt(folders["pypi"])
            binds = {source: "/lab/source", **{folder: f"/lab/{name}" for name, folder in folders.items()}}
            chroot = self.tree.chroot(binds, {"DEBIAN_FRONTEND": "noninteractive"})
            log = self.session.cache.log(f"package-{re.sub('[^a-z0-9_]+', '-', what.lower())}")
            text = self.session.progress.call(f"making the {what}", chroot.argv(["sh", "-ec", script]), log)
            found = [path for name in names for path in sorted(folders["out"].glob(name))]
            if len(found) < len(names):
                raise LabError(f"the {what} was not made", f"Not in it: {', '.join(names)}. Log: {log}", "look there")
            for line in re.findall(r"^(?:[EW]: .*|\"manylinux.*)$", text, re.MULTILINE):
                self.session.progress.say(line)
            return [self._kept(path) for path in found]

    def _kept(self, path: Path) -> Path:
        if not path.is_dir():
            return Path(shutil.copy(path, self.out))
        shutil.rmtree(self.out / path.name, ignore_errors=True)
        return Path(shutil.copytree(path, self.out / path.name))

    def _copied(self, scratch: Path) -> Path:
        return Path(shutil.copytree(PROJECT, scratch / "source", ignore=shutil.ignore_patterns(*IGNORED)))

    def _unpacked(self, scratch: Path) -> Path:
        """Return a folder with what the source distribution has, so that it is known to be complete."""
        [archive] = self.sdist()
        with tarfile.open(archive) as packed:
            # Debian 12's Python has no filter yet, and the archive is our own
            packed.extraction_filter = getattr(tarfile, "data_filter", None)
            packed.extractall(scratch)
        return scratch / archive.name.removesuffix(".tar.gz")

    def _fetch_ioctl_opt(self, folder: Path) -> None:
        """Fetch the wheel that one of the Debian packages is made of, once."""
        kept = self.tree.folder / "pypi"
        if not kept.exists():
            [line] = [line for line in LOCK.read_text().splitlines() if line.startswith("ioctl-opt==")]
            (folder / "lock").write_text(f"{line}\n")
            argv = ["python3", "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
            argv += ["--no-cache-dir", "--dest", "/lab/pypi", "--requirement", "/lab/pypi/lock"]
            chroot = self.tree.chroot({folder: "/lab/pypi"}, {}, network=True)
            log = self.session.cache.log("package-pypi")
            self.session.progress.call("fetching ioctl-opt from PyPI", chroot.argv(argv), log)
            shutil.copytree(folder, kept)
        shutil.copytree(kept, folder, dirs_exist_ok=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="tools/package",
        description="Make what is handed on, in a Debian 13 tree in the lab's cache (see tools/lab --help).",
        epilog="Without a name of a thing: all of them. The same source gives the same files, except for times.",
    )
    parser.add_argument("what", nargs="*", metavar="THING", help=f"of {', '.join(THINGS)} (default all)")
    parser.add_argument("--out", type=Path, default=PROJECT / "dist", metavar="DIR", help="default: dist/")
    parser.add_argument(
        "--machine", choices=MACHINES, action="append", help="of the wheel; may be repeated (default x86_64)"
    )
    return parser


THINGS = ("sdist", "wheel", "deb", "site")


def make(argv: Sequence[str]) -> int:
    """Make what the command line names."""
    parser = build_parser()
    options = parser.parse_args(argv)
    unknown = [word for word in options.what if word not in THINGS]
    if unknown:
        parser.error(f"unknown: {unknown[0]}; one of {', '.join(THINGS)}")
    packager = Packager(Session(), options.out)
    packager.set_up()
    wanted = options.what or THINGS
    made = packager.sdist() if "sdist" in wanted else []
    made += packager.wheels(options.machine or ["x86_64"]) if "wheel" in wanted else []
    made += packager.debs() if "deb" in wanted else []
    made += packager.site() if "site" in wanted else []
    for path in made:
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    # which imports the tests' parts, one of which is this module's
    from labkit import cli

    sys.exit(cli.main(sys.argv[1:], make))
