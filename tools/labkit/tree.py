"""The VM's user space: a Debian 13 tree in the cache, and the disk image made of it."""

import hashlib
import os
import shutil
from pathlib import Path

from labkit import host
from labkit.cache import Cache, building, forget_old, hold, once, remove
from labkit.chroot import Chroot, contained
from labkit.images import make_image
from labkit.progress import Progress

SUITE = "trixie"
SOURCES = (
    f"deb http://deb.debian.org/debian {SUITE} main",
    f"deb http://deb.debian.org/debian {SUITE}-updates main",
    f"deb http://deb.debian.org/debian-security {SUITE}-security main",
    f"deb http://deb.debian.org/debian {SUITE}-backports main",
)
PACKAGES = (
    *("python3", "python3-dev", "python3-pip", "python3-setuptools", "python3-wheel"),
    *("python3-cffi", "python3-psutil", "python3-matplotlib"),
    *("python3-pytest", "python3-pytest-benchmark", "python3-hypothesis", "mypy"),
    # the newest headers there are: what uapi.py knows is compared with them
    "linux-libc-dev/trixie-backports",
    *("gcc", "make", "libc6-dev", "bc", "pahole", "libelf1t64", "libssl3t64"),
    *("iproute2", "iputils-ping", "kmod", "mount", "e2fsprogs", "busybox-static", "procps", "strace"),
    *("xz-utils", "zstd", "ca-certificates", "valgrind"),
    # real clients, written by others, that tests run against our devices
    *("ethtool", "iperf3", "dnsmasq-base", "qemu-system-x86", "ipxe-qemu"),
    # what dpdk-testpmd is linked to, and the drivers it has to load
    *(f"librte-{name}25" for name in ("bitratestats", "bpf", "cmdline", "crypto-scheduler", "gro", "gso")),
    *(f"librte-{name}25" for name in ("latencystats", "mempool-ring", "pdump", "reorder")),
    *(f"librte-net-{name}25" for name in ("bnxt", "bond", "dpaa", "i40e", "iavf", "ice", "ixgbe", "mlx5-")),
    *(f"librte-net-{name}25" for name in ("pcap", "virtio")),
    *("ibverbs-providers", "libbsd0", "libfdt1", "libjansson4", "libnuma1", "libpcap0.8t64"),
)
# dpdk-testpmd comes in a package for developers, which depends on all of DPDK's libraries and on their headers.
TESTPMD = """cd "$1/tmp" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get download dpdk-dev &&
dpkg-deb --fsys-tarfile dpdk-dev_*.deb | tar -x -C "$1" ./usr/bin/dpdk-testpmd && rm dpdk-dev_*.deb"""
# One tree for this recipe and one for another branch or version of the project.
KEPT = 2
LOCK = Path(__file__).with_name("pypi.lock")
NEEDED_BYTES = 3_500_000_000
KEPT_APT = (
    'APT::Install-Recommends "false";',
    'Acquire::Languages "none";',
    'Acquire::Retries "3";',
    'APT::Sandbox::User "root";',
)


class Tree:
    """One Debian tree, named by a hash of its recipe so that a changed recipe makes another one."""

    def __init__(self, cache: Cache, progress: Progress) -> None:
        self.cache = cache
        self.progress = progress
        self.folder = cache.trees / self.identity()
        self.root = self.folder / "root"
        self.image = self.folder / "root.img"

    @staticmethod
    def identity() -> str:
        """Return the hash of the recipe."""
        recipe = "\n".join([*SOURCES, *PACKAGES, TESTPMD, *KEPT_APT, LOCK.read_text()])
        return hashlib.sha256(recipe.encode()).hexdigest()[:12]

    @property
    def ready(self) -> bool:
        """Whether the tree and its image are there, whole."""
        return self.image.exists()

    def ensure(self) -> None:
        """Build the tree unless it is there."""
        if self.ready:
            hold(self.folder)
            return
        self.cache.require_space(NEEDED_BYTES, "the Debian tree")
        with building(self.folder, goes_on=True) as partial:
            once(partial, "bootstrap", lambda: self._bootstrap(partial / "root"))
            once(partial, "python-packages", lambda: self._python_packages(partial))
            make_image(self.cache, self.progress, partial / "root", partial / "root.img", "writing the tree's image")
        hold(self.folder)
        forget_old(self.cache.trees, KEPT)

    def _bootstrap(self, root: Path) -> None:
        remove(root)
        options = [*KEPT_APT, *host.acquire_options()]
        argv = ["mmdebstrap", "--mode=root", "--variant=apt", "--architectures=amd64", f"--keyring={host.KEYRING}"]
        argv += [f"--include={','.join(PACKAGES)}", *(f"--aptopt={option}" for option in options)]
        argv += [f"--customize-hook={TESTPMD}", SUITE, str(root), *SOURCES]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        title = f"making a Debian 13 tree ({len(PACKAGES)} packages and what they need, about 260 MB to download)"
        self.progress.call(title, contained(argv), self.cache.log("tree"), environment)

    def _python_packages(self, partial: Path) -> None:
        out = partial / "pip"
        remove(out)
        out.mkdir()
        chroot = self.chroot(
            root=partial / "root",
            binds={out: "/lab/out", LOCK.parent: "/lab/kit"},
            network=True,
            environment=host.pip_environment(),
        )
        argv = ["python3", "-m", "pip", "install", "--break-system-packages", "--no-deps", "--require-hashes"]
        argv += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--root-user-action=ignore"]
        argv += ["--root", "/lab/out", "-r", f"/lab/kit/{LOCK.name}"]
        self.progress.call(
            "adding atheris, ioctl-opt and ruff from PyPI", chroot.argv(argv), self.cache.log("tree-pip")
        )
        shutil.copytree(out, partial / "root", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(out)

    def chroot(
        self,
        *,
        root: Path | None = None,
        layers: tuple[Path, ...] = (),
        binds: dict[Path, str] | None = None,
        environment: dict[str, str] | None = None,
        folder: str = "/",
        network: bool = False,
    ) -> Chroot:
        """Return a way into the tree; with the network, its settings come along."""
        variables, files = dict(environment or {}), {}
        if network:
            variables |= host.network_environment()
            files[Path("/etc/resolv.conf")] = "/etc/resolv.conf"
            files[Path("/etc/hosts")] = "/etc/hosts"
            bundle = host.ca_bundle()
            if bundle:
                files[bundle] = "/lab/ca.crt"
                variables |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), "/lab/ca.crt")
        files = {path: inside for path, inside in files.items() if path.exists()}
        return Chroot(root or self.root, self.cache.mount_point, layers, binds or {}, files, variables, folder)
