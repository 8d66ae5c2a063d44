"""The source of a kernel, from the distribution's source package, and the text of a configuration for it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit import archive
from labkit.cache import remove
from labkit.kernel import Builder

# What building a kernel needs and the tree does not have.
TOOLS = ("flex", "bison")
# Unpacked without the bulk that no kernel of the lab is made of. Kconfig and Makefiles stay: others refer to them.
LEFT_OUT = (
    *("*/Documentation/*.rst", "*/Documentation/*.yaml", "*/Documentation/*.txt", "*/tools/testing/*"),
    *(f"*/drivers/{folder}/*.[ch]" for folder in ("gpu", "net/ethernet", "net/wireless", "media", "infiniband")),
    *(f"*/drivers/{folder}/*.[ch]" for folder in ("staging", "scsi", "iio", "clk", "pinctrl")),
    "*/sound/*.[ch]",
    "*/arch/*/boot/dts/*",
    *(f"*/arch/{name}/*.[chS]" for name in ("alpha", "arc", "arm", "arm64", "csky", "hexagon", "loongarch", "m68k")),
    *(f"*/arch/{name}/*.[chS]" for name in ("microblaze", "mips", "nios2", "openrisc", "parisc", "powerpc", "riscv")),
    *(f"*/arch/{name}/*.[chS]" for name in ("s390", "sh", "sparc", "xtensa")),
)


def configuration(settings: Mapping[str, str]) -> str:
    """Return settings as lines of a kernel's .config."""
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in settings.items()
    )


def lacking(config: str, required: Mapping[str, str]) -> list[str]:
    """Return the required settings that a .config does not have."""
    lines = set(config.splitlines())
    return [f"CONFIG_{name}={value}" for name, value in required.items() if f"CONFIG_{name}={value}" not in lines]


class SourceTree:
    """A kernel's source in `build/` of a folder that is being built, with the tools that building it needs."""

    def __init__(self, stock: Builder, log: str, tools: Sequence[str] = TOOLS) -> None:
        self.stock = stock
        self.log = log
        self.tools = tools

    def fetch(self, work: Path, source: archive.Package) -> None:
        """Download the source package and the tools into the folder `work`."""
        remove(work)
        work.mkdir()
        argv = ["apt-get", "download", source.pin]
        self.stock.apt("fetching its source", f"{self.log}-fetch", argv, {work: "/lab/debs"})
        argv = ["apt-get", "install", "-y", "--download-only", "--no-install-recommends"]
        argv += ["-o", "Dir::Cache::Archives=/lab/debs", *self.tools]
        self.stock.apt("fetching what building it needs", f"{self.log}-fetch-tools", argv, {work: "/lab/debs"})

    def unpack(self, partial: Path, source: archive.Package) -> None:
        """Unpack what was downloaded into `work` to `build` and `tools`; the downloads go."""
        binds = {partial / name: f"/lab/{name}" for name in ("work", "build", "tools")}
        for name in ("build", "tools"):
            remove(partial / name)
            (partial / name).mkdir()
        left_out = " ".join(f"--exclude={shlex.quote(pattern)}" for pattern in LEFT_OUT)
        lines = [
            f"dpkg-deb --fsys-tarfile /lab/work/{source.name}_*.deb | tar -xO ./usr/src/{source.name}.tar.xz "
            f"| tar -xJ -C /lab/build --strip-components=1 {left_out}",
            f"find /lab/work -name '*.deb' -not -name '{source.name}_*' -exec dpkg-deb -x '{{}}' /lab/tools ';'",
        ]
        self.script("unpacking its source", "unpack", lines, binds)
        remove(partial / "work")

    def script(
        self, title: str, log: str, lines: list[str], binds: dict[Path, str], layers: tuple[Path, ...] = ()
    ) -> None:
        """Run lines of shell in the lab's tree, as one step."""
        chroot = self.stock.tree.chroot(binds=binds, layers=layers)
        path = self.stock.cache.log(f"{self.log}-{log}")
        self.stock.progress.call(title, chroot.argv(["sh", "-ec", "\n".join(lines)]), path)
