"""The machine the lab runs on: what it must be, and the Debian packages it must have."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from labkit.cache import Cache
from labkit.errors import LabError
from labkit.progress import Progress

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE_KEY = Path("/usr/share/keyrings/debian-archive-trixie-stable.gpg")
SYSTEMS = "Debian 12 or 13, or Ubuntu 24.04 or newer"
KEYRING_PAGE = "https://packages.debian.org/trixie/all/debian-archive-keyring/download"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
ACQUIRE = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until", "Acquire::Check-Date")
ACQUIRE_PREFIXES = ("Acquire::http::Proxy::", "Acquire::https::Proxy::", "Acquire::https::CAInfo")
NETWORK_VARIABLES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PIP_VARIABLES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "PIP_PROXY",
    "PIP_DEFAULT_TIMEOUT",
    "PIP_TIMEOUT",
    "PIP_RETRIES",
)

# A file that must be there, and the Debian package that brings it.
NEEDED: tuple[tuple[str, str], ...] = (
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/bin/mmdebstrap", "mmdebstrap"),
    ("/sbin/mke2fs", "e2fsprogs"),
    (str(SUITE_KEY), "debian-archive-keyring"),
)


def check_machine(command: str = "setup") -> None:
    """Refuse a machine on which the lab cannot work, with the reason."""
    if platform.machine() != "x86_64":
        raise LabError(
            f"this machine is {platform.machine()}; the lab runs on x86_64 only",
            "Its kernels and its VM are amd64.",
            f"run it on an x86_64 machine with {SYSTEMS}",
        )
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise LabError(
            "this is not a Debian system (no apt-get, no dpkg)",
            "The lab makes its VM from Debian packages, with Debian's tools.",
            f"run it on {SYSTEMS}",
        )
    if os.geteuid() != 0:
        raise LabError(
            "the lab needs root",
            "It makes a Debian tree (chroot, mounts) and installs Debian packages.",
            f"sudo tools/lab {command}",
        )


def missing_packages(needed: tuple[tuple[str, str], ...] = NEEDED) -> list[str]:
    """Return the Debian packages that are not there yet."""
    return [package for path, package in needed if not Path(path).exists()]


def ensure_packages(cache: Cache, progress: Progress) -> None:
    """Install what is missing on the host, after saying all that this touches."""
    missing = missing_packages()
    if not missing:
        return
    progress.say(f"this machine lacks what the lab needs; installing the Debian packages: {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    progress.call("reading the package index", ["apt-get", "update"], cache.log("host-apt-update"), environment)
    interrupted = interrupted_packages(_output("dpkg", "--audit"))
    if interrupted:
        progress.say(f"dpkg --configure -a finishes what an earlier installation left: {' '.join(interrupted)}")
        argv = ["dpkg", "--configure", "-a"]
        progress.call("finishing interrupted installations", argv, cache.log("host-dpkg"), environment)
    words = ["install", "-y", "--no-install-recommends", *missing]
    for line in changes(_output("apt-get", "--simulate", *words)):
        progress.say(line)
    argv = ["apt-get", "-o", "DPkg::Lock::Timeout=120", *words]
    progress.call(f"installing {' '.join(missing)}", argv, cache.log("host-apt-install"), environment)
    still = missing_packages()
    if still:
        raise _not_brought(still)


def _output(*argv: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment).stdout


def interrupted_packages(audit: str) -> list[str]:
    """Return the packages that `dpkg --audit` complains of."""
    return [found[1] for line in audit.splitlines() if (found := re.match(r" (\S+) ", line))]


def changes(simulation: str) -> list[str]:
    """Say what `apt-get --simulate install` would do: which packages are new, upgraded, removed."""
    new: list[str] = []
    upgraded: list[str] = []
    removed: list[str] = []
    for line in simulation.splitlines():
        if found := re.match(r"Inst (\S+) (\[)?", line):
            (upgraded if found[2] else new).append(found[1])
        elif found := re.match(r"Remv (\S+) ", line):
            removed.append(found[1])
    kinds = (("installs", new), ("upgrades", upgraded), ("removes", removed))
    return [f"apt {verb} {len(names)} packages: {' '.join(names)}" for verb, names in kinds if names]


def _not_brought(packages: list[str]) -> LabError:
    """Return the error for packages of this distribution that are older than what the lab needs of them."""
    lacking = [path for path, package in NEEDED if package in packages]
    name = distribution()
    if lacking == [str(SUITE_KEY)] and not name.startswith("Debian"):
        return LabError(
            f"{name} has no key of Debian 13, of which the lab makes its tree",
            f"Its package debian-archive-keyring is older, and has no {SUITE_KEY}.",
            f"dpkg -i debian-archive-keyring_*_all.deb   (from {KEYRING_PAGE})",
        )
    return LabError(
        f"apt installed {' '.join(packages)}, but not what the lab needs from it",
        f"Missing on {name}: {', '.join(lacking)}",
        f"apt-get install {' '.join(packages)}   (of Debian 12's or 13's latest point release)",
    )


def distribution(release: Path = Path("/etc/os-release")) -> str:
    """Return what this machine's distribution calls itself."""
    try:
        found = re.search(r'^PRETTY_NAME="?([^"\n]+)', release.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "this system"


def acquire_options() -> list[str]:
    """Return the host's own apt settings that matter for reaching the archive, as apt.conf lines."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
    return select_acquire(dump.stdout)


def select_acquire(dump: str) -> list[str]:
    """Choose from the text of `apt-config dump` the lines to hand on."""
    kept = []
    for line in dump.splitlines():
        name, _, value = line.partition(" ")
        if (name in ACQUIRE or name.startswith(ACQUIRE_PREFIXES)) and value not in ('"";', ""):
            kept.append(line)
    return kept


def network_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the proxy settings that programs in the tree must know."""
    source = os.environ if environ is None else environ
    return {name: source[name] for name in NETWORK_VARIABLES if name in source}


def pip_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the settings by which pip reaches its index (paths of this machine excepted)."""
    source = os.environ if environ is None else environ
    return {name: source[name] for name in PIP_VARIABLES if name in source}


def ca_bundle(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the certificate bundle that this machine trusts, private authorities included."""
    source = os.environ if environ is None else environ
    named = [source[name] for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE") if source.get(name)]
    for path in [*map(Path, named), CA_BUNDLE]:
        if path.is_file():
            return path
    return None
