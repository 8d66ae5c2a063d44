"""What the archive offers: stanzas of its index, and the choice of a kernel whose every part is there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from labkit.errors import LabError

ARCH = "amd64"
LATEST = "latest"
IMAGE = re.compile(rf"^linux-image-(\d+\.\d+[^-]*-{ARCH})$")
# The parts that a kernel image may be split into; the tools that make an initrd are not wanted.
IMAGE_PARTS = re.compile(r"^linux-(image|modules|binary|base)-\d")
HEADER_PARTS = re.compile(r"^linux-(headers|kbuild|base)-\d")


@dataclass(frozen=True)
class Package:
    """One version of one package in the index."""

    name: str
    version: str
    depends: tuple[tuple[str, ...], ...]
    size: int

    @property
    def pin(self) -> str:
        """Return the name by which apt gets exactly this one."""
        return f"{self.name}={self.version}"


@dataclass(frozen=True)
class KernelChoice:
    """A kernel of the archive: its release name and the packages that make it."""

    release: str
    version: str
    image: tuple[Package, ...]
    headers: tuple[Package, ...]
    tools: tuple[str, ...]
    source: Package

    @property
    def download(self) -> int:
        """Return how many bytes have to be fetched."""
        return sum(package.size for package in {*self.image, *self.headers, self.source})


def parse_index(text: str) -> list[Package]:
    """Read stanzas as `apt-cache show` prints them."""
    packages = []
    for stanza in text.split("\n\n"):
        values = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
        if "Package" in values:
            depends = ", ".join(values[key] for key in ("Pre-Depends", "Depends") if key in values)
            packages.append(
                Package(values["Package"], values["Version"], _alternatives(depends), int(values.get("Size", 0)))
            )
    return packages


def _alternatives(field: str) -> tuple[tuple[str, ...], ...]:
    groups = []
    for group in field.split(","):
        names = tuple(re.split(r"[ (:\[]", name.strip(), maxsplit=1)[0] for name in group.split("|"))
        if names != ("",):
            groups.append(names)
    return tuple(groups)


def order(version: str) -> tuple[int, ...]:
    """Return a key by which newer packages of one kernel line sort later."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def fits(release: str, wanted: str) -> bool:
    """Return whether a release name matches the wanted one: "latest", or a prefix that ends at a number's end."""
    return wanted == LATEST or re.match(rf"{re.escape(wanted)}(?!\d)", release) is not None


def choose_kernel(packages: Iterable[Package], wanted: str) -> KernelChoice:
    """Return the newest kernel that fits and for which image, headers and source of one version exist."""
    index = {(package.name, package.version): package for package in packages}
    images = [package for package in index.values() if IMAGE.match(package.name)]
    lines = sorted({".".join(image.name.split("-")[2].split(".")[:2]) for image in images}, key=order)
    for image in sorted(images, key=lambda package: order(package.version), reverse=True):
        release = image.name.removeprefix("linux-image-")
        if fits(release, wanted):
            choice = _assemble(index, image, release)
            if choice:
                return choice
    raise LabError(
        f"no kernel in the archive fits --kernel {wanted} with its image, headers and source all there",
        f"The archive has kernels of these lines: {', '.join(lines) or 'none'}.",
        "tools/lab setup --kernel latest",
    )


def _assemble(index: dict[tuple[str, str], Package], image: Package, release: str) -> KernelChoice | None:
    series = ".".join(release.split("+", maxsplit=1)[0].split("-", maxsplit=1)[0].split(".")[:2])
    headers = index.get((f"linux-headers-{release}", image.version))
    source = index.get((f"linux-source-{series}", image.version))
    if headers is None or source is None:
        return None
    image_set, _ = _follow(index, image, IMAGE_PARTS)
    header_set, tools = _follow(index, headers, HEADER_PARTS)
    return KernelChoice(release, image.version, tuple(image_set), tuple(header_set), tuple(tools), source)


def _follow(
    index: dict[tuple[str, str], Package], first: Package, wanted: re.Pattern[str]
) -> tuple[list[Package], list[str]]:
    """Follow dependencies within the kernel's own packages; name the others (a compiler, a library)."""
    found, others = [first], []
    for package in found:
        for names in package.depends:
            name = names[0]
            part = index.get((name, first.version)) if wanted.match(name) else None
            if part is not None and part not in found:
                found.append(part)
            elif part is None and not name.startswith("linux-") and name not in others:
                others.append(name)
    return found, others
