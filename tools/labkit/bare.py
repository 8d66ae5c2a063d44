"""Debian trees beside that of the VM: bare ones to install the package in, and one with the tools that build it."""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labkit import host
from labkit.cache import Cache, building, forget_old, hold, once, remove
from labkit.chroot import Chroot, contained
from labkit.progress import Progress
from labkit.tree import KEPT_APT

LOCK = Path(__file__).with_name("packaging.lock")
NEEDED_BYTES = 2_000_000_000
# As if every question of apt were answered with yes.
APT = (*KEPT_APT, 'APT::Get::Assume-Yes "true";')


@dataclass(frozen=True)
class Recipe:
    """What a tree is made of: a Debian suite, the packages in it, and packages that are only downloaded."""

    name: str
    title: str
    suite: str
    packages: Sequence[str] = ()
    downloaded: Sequence[str] = ()
    architectures: Sequence[str] = ("amd64",)
    additions: Mapping[str, str] = field(default_factory=dict)
    """Scripts that run in the tree, with the network, and fill /lab/out with what is added to it."""

    def sources(self) -> list[str]:
        """Return the lines of sources.list."""
        archive = "http://deb.debian.org"
        return [
            f"deb {archive}/debian {self.suite} main",
            f"deb {archive}/debian {self.suite}-updates main",
            f"deb {archive}/debian-security {self.suite}-security main",
        ]

    def identity(self) -> str:
        """Return the name of the tree's folder, which is another one for another recipe."""
        words = [*self.sources(), *self.packages, "", *self.downloaded, "", *self.architectures, *APT]
        words += [*self.additions.values(), LOCK.read_text()] if self.additions else []
        return f"{self.name}-{hashlib.sha256(chr(10).join(words).encode()).hexdigest()[:12]}"


# What the commands of the README's section "Install" install: there before, so that a test needs no network.
_USED = ("python3", "python3-venv", "python3-psutil", "python3-cffi-backend", "gcc", "python3-dev", "man-db")
# What reads the output of `vhost-vdpa facts`.
_READERS = ("ansible-core", "prometheus-node-exporter")
# What checks the XML in `vhost-vdpa help serve`.
_LIBVIRT = ("libvirt-clients",)
BARE = (
    Recipe("bookworm", "bare Debian 12", "bookworm", ("ca-certificates",), (*_USED, "bash-completion", *_LIBVIRT)),
    Recipe("trixie", "bare Debian 13", "trixie", ("ca-certificates",), (*_USED, "bash-completion", *_READERS)),
)
# Two files of Python for arm64 that a cross compiler needs: what its types are like, and how modules are built for it.
_ARM64_PYTHON = """cd /tmp && apt-get download libpython3.13-dev:arm64 libpython3.13-minimal:arm64
for file in *_arm64.deb; do dpkg-deb --extract $file all; done
mkdir -p /lab/out/usr/include /lab/out/usr/lib/python3.13
cp -r all/usr/include/aarch64-linux-gnu /lab/out/usr/include
cp all/usr/lib/python3.13/_sysconfigdata_* /lab/out/usr/lib/python3.13"""
_AUDITWHEEL = """python3 -m pip install --no-deps --require-hashes --only-binary=:all: --break-system-packages \
    --no-cache-dir --disable-pip-version-check --root-user-action=ignore --root /lab/out -r /lab/kit/packaging.lock"""
BUILDING = Recipe(
    "packaging",
    "a Debian 13 tree with tools for packaging",
    "trixie",
    (
        *("gcc", "libc6-dev", "python3-dev", "python3-pip", "python3-setuptools", "python3-wheel", "python3-cffi"),
        *("python3-psutil", "python3-shtab"),
        *("debhelper", "dh-python", "pybuild-plugin-pyproject", "dpkg-dev", "lintian"),
        *("python3-packaging", "python3-pyelftools", "patchelf", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"),
        *("python3-sphinx", "python3-myst-parser", "ca-certificates"),
    ),
    architectures=("amd64", "arm64"),
    additions={"what a compiler for arm64 needs of Python": _ARM64_PYTHON, "auditwheel, from PyPI": _AUDITWHEEL},
)
ARM64 = Recipe(
    "trixie-arm64",
    "bare Debian 13 for arm64",
    "trixie",
    # what the wheel needs, and the tests: installed with the tree, since dpkg is slow when it is emulated
    (
        *("ca-certificates", "python3", "python3-venv", "python3-psutil", "python3-cffi-backend"),
        *("python3-pytest", "python3-pytest-benchmark", "python3-hypothesis"),
    ),
    architectures=("arm64",),
)
KEPT = 6


class BareTree:
    """A tree made once from a recipe and never changed: what runs in it writes to a layer that goes with it."""

    def __init__(self, cache: Cache, progress: Progress, recipe: Recipe) -> None:
        self.cache = cache
        self.progress = progress
        self.recipe = recipe
        self.folder = cache.bare / recipe.identity()
        self.root = self.folder / "root"

    @property
    def ready(self) -> bool:
        """Whether the tree is there, whole."""
        return self.root.exists()

    def ensure(self) -> None:
        """Make the tree unless it is there."""
        if self.ready:
            hold(self.folder).touch()
            return
        self.cache.require_space(NEEDED_BYTES, self.recipe.title)
        with building(self.folder, goes_on=True) as partial:
            once(partial, "bootstrap", lambda: self._bootstrap(partial / "root"))
            for title, script in self.recipe.additions.items():
                once(partial, title.replace(" ", "-"), lambda t=title, s=script: self._add(partial, t, s))  # type: ignore[misc]
        hold(self.folder)
        forget_old(self.cache.bare, KEPT)

    def _bootstrap(self, root: Path) -> None:
        remove(root)
        recipe = self.recipe
        argv = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--architectures={','.join(recipe.architectures)}"]
        # lists and downloads stay, so that apt works without a network
        argv += ["--skip=cleanup/apt", f"--keyring={host.KEYRING}"]
        # an emulator is registered before a tree for another machine is made: the host needs none of its own
        argv += ["--skip=check/qemu"] if recipe.architectures[0] != "amd64" else []
        argv += [f"--include={','.join(recipe.packages)}"] if recipe.packages else []
        # what is lost in a crash of this machine is made again
        argv += ["--dpkgopt=force-unsafe-io"]
        argv += [f"--aptopt={option}" for option in [*APT, *host.acquire_options()]]
        if recipe.downloaded:
            words = " ".join(recipe.downloaded)
            fetch = 'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get install --yes --download-only'
            argv += [f"--customize-hook={fetch} {words}"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        self.progress.call(
            f"making {recipe.title}",
            contained([*argv, recipe.suite, str(root), *recipe.sources()]),
            self.cache.log(f"tree-{recipe.name}"),
            environment,
        )

    def _add(self, partial: Path, title: str, script: str) -> None:
        out = partial / "out"
        remove(out)
        out.mkdir()
        chroot = self.chroot({out: "/lab/out", LOCK.parent: "/lab/kit"}, {}, network=True, root=partial / "root")
        log = self.cache.log(f"tree-{self.recipe.name}-more")
        self.progress.call(f"adding {title}", chroot.argv(["sh", "-ec", script]), log)
        shutil.copytree(out, partial / "root", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(out)

    def chroot(
        self,
        binds: Mapping[Path, str],
        environment: Mapping[str, str],
        folder: str = "/",
        network: bool = False,
        root: Path | None = None,
    ) -> Chroot:
        """Return a way into the tree; with the network, its settings come along."""
        variables, files = dict(environment), {}
        if network:
            variables |= host.network_environment() | host.pip_environment()
            files = {Path("/etc/resolv.conf"): "/etc/resolv.conf", Path("/etc/hosts"): "/etc/hosts"}
            if bundle := host.ca_bundle():
                files[bundle] = "/lab/ca.crt"
                variables |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), "/lab/ca.crt")
        files = {path: inside for path, inside in files.items() if path.exists()}
        return Chroot(root or self.root, self.cache.mount_point, (), dict(binds), files, variables, folder)
