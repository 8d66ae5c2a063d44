"""A stock kernel of the archive in the cache, with the device modules built from the same kernel's source."""

import json
import lzma
import re
import shutil
import struct
import zlib
from pathlib import Path

from labkit import archive
from labkit.archive import KernelChoice
from labkit.cache import DONE, Cache, building, once, remove, size
from labkit.errors import LabError
from labkit.images import make_image
from labkit.progress import Progress
from labkit.tree import Tree

NEEDED_BYTES = 2_000_000_000
# What the initial RAM file system loads to reach its root; and what a run may load later. Absent ones are built in.
BOOT_MODULES = ("virtio_blk", "crc32c_generic", "ext4", "overlay", "9pnet_virtio", "9p", "virtio_rng")
RUN_MODULES = ("vhost_vdpa", "vdpa_sim_net", "vdpa_sim_blk", "virtio_net", "virtio_vdpa")
# Folder in the kernel's source, its modules, and the settings that switch them on.
BUILT = (
    ("drivers/vhost", ("vringh",), ("CONFIG_VHOST_RING=m",)),
    (
        "drivers/vdpa/vdpa_sim",
        ("vdpa_sim", "vdpa_sim_net", "vdpa_sim_blk"),
        ("CONFIG_VDPA_SIM=m", "CONFIG_VDPA_SIM_NET=m", "CONFIG_VDPA_SIM_BLOCK=m"),
    ),
)
PLAIN_MAKEFILES = {"drivers/vhost": "obj-$(CONFIG_VHOST_RING) += vringh.o\n"}


class Kernel:
    """One kernel in the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.release = folder.name
        self.modules_image = folder / "modules.img"
        self.headers = folder / "headers"
        self.symbols = folder / "symbols"

    @property
    def image(self) -> Path:
        """Return what QEMU boots: the unpacked kernel where it could be had, else the compressed one."""
        plain = self.folder / "vmlinux"
        return plain if plain.exists() else self.folder / "vmlinuz"

    @property
    def version(self) -> str:
        """Return the version of its Debian package."""
        return str(json.loads((self.folder / "kernel.json").read_text())["version"])

    def boot_modules(self) -> list[Path]:
        """Return the modules to load before there is a root file system, in order."""
        return sorted((self.folder / "boot").iterdir())


def cached(cache: Cache) -> list[Kernel]:
    """Return all kernels in the cache, the newest first."""
    folders = [path.parent for path in cache.kernels.glob("*/kernel.json") if not path.parent.name.endswith(".partial")]
    kernels = [Kernel(folder) for folder in folders]
    return sorted(kernels, key=lambda kernel: archive.order(kernel.version), reverse=True)


def find(cache: Cache, wanted: str) -> Kernel | None:
    """Return the newest kernel in the cache that fits; the latest is the one that the archive named last time."""
    if wanted == archive.LATEST:
        wanted = cache.latest_kernel.read_text().strip() if cache.latest_kernel.exists() else "none yet"
    return next((kernel for kernel in cached(cache) if archive.fits(kernel.release, wanted)), None)


class Builder:
    """Fetches one kernel and builds its device modules."""

    def __init__(self, cache: Cache, tree: Tree, progress: Progress) -> None:
        self.cache = cache
        self.tree = tree
        self.progress = progress

    def ensure(self, wanted: str, refresh: bool = False) -> Kernel:
        """Return a kernel that fits; fetch one when the cache has none, or when a newer one was asked for."""
        kernel = find(self.cache, wanted)
        if kernel and not refresh:
            return kernel
        choice = self.choose(wanted)
        if wanted == archive.LATEST:
            self.cache.latest_kernel.write_text(f"{choice.release}\n")
        kernel = Kernel(self.cache.kernels / choice.release)
        if (kernel.folder / "kernel.json").exists() and kernel.version == choice.version:
            return kernel
        self.cache.require_space(NEEDED_BYTES, f"the kernel {choice.release}")
        self.progress.say(
            f"kernel {choice.release} ({choice.version}): {size(choice.download)} to download (image, headers, source)"
        )
        with building(kernel.folder, goes_on=True) as partial:
            self._build(partial, choice)
        return kernel

    def choose(self, wanted: str) -> KernelChoice:
        """Read the archive's index and choose."""
        self.cache.lists.mkdir(parents=True, exist_ok=True)
        self.apt("reading the archive's index", "kernel-index", ["apt-get", "update"])
        script = (
            "apt-cache pkgnames linux- | grep -E "
            "'^linux-(image|modules|binary|base|headers|kbuild|source)-[0-9]' | grep -vE -- '-(rt|cloud)-|-dbg$' "
            "| xargs apt-cache show"
        )
        text = self.apt("choosing a kernel", "kernel-choice", ["sh", "-c", script])
        return archive.choose_kernel(archive.parse_index(text), wanted)

    def apt(self, title: str, log: str, argv: list[str], binds: dict[Path, str] | None = None) -> str:
        """Run apt in the tree as one step, with the archive's index as fetched; with binds, in /lab/debs from them."""
        mounts = {self.cache.lists: "/var/lib/apt/lists", **(binds or {})}
        chroot = self.tree.chroot(
            binds=mounts,
            network=True,
            folder="/lab/debs" if binds else "/",
            environment={"DEBIAN_FRONTEND": "noninteractive"},
        )
        return self.progress.call(title, chroot.argv(argv), self.cache.log(log))

    def _build(self, partial: Path, choice: KernelChoice) -> None:
        work = partial / "work"
        debs = work / "debs"
        once(partial, f"download-{choice.version.replace('/', '_')}", lambda: self._download(debs, choice))
        for path in (*work.iterdir(), *partial.iterdir()):
            if path not in (debs, work, partial / DONE):
                remove(path)
        self._unpack(work, debs, choice)
        self._keep_image(partial, work, choice)
        self._build_modules(partial, work, choice)
        modules = work / "image/usr/lib/modules"
        self._prepare_modules(partial, modules / choice.release, choice.release)
        make_image(self.cache, self.progress, modules, partial / "modules.img", "writing the modules' image")
        (work / "headers").rename(partial / "headers")
        shutil.rmtree(work)
        (partial / "kernel.json").write_text(json.dumps({"release": choice.release, "version": choice.version}) + "\n")

    def _download(self, debs: Path, choice: KernelChoice) -> None:
        remove(debs)
        debs.mkdir(parents=True)
        pins = sorted({package.pin for package in (*choice.image, *choice.headers, choice.source)})
        binds = {debs: "/lab/debs"}
        self.apt(f"fetching the kernel, {size(choice.download)}", "kernel-fetch", ["apt-get", "download", *pins], binds)
        more = ["apt-get", "install", "-y", "--download-only", "--no-install-recommends"]
        more += ["-o", "Dir::Cache::Archives=/lab/debs", *choice.tools]
        self.apt("fetching what building its modules needs", "kernel-fetch-tools", more, binds)

    def _unpack(self, work: Path, debs: Path, choice: KernelChoice) -> None:
        image_names = {package.name for package in choice.image}
        lines = ["mkdir -p /lab/work/image /lab/work/headers /lab/work/source"]
        for deb in sorted(debs.glob("*.deb")):
            name = deb.name.split("_")[0]
            if name == choice.source.name:
                folders = " ".join(f"'*/{folder}/*'" for folder, _, _ in BUILT)
                tarball = f"./usr/src/{name}.tar.xz"
                lines.append(
                    f"dpkg-deb --fsys-tarfile '/lab/work/debs/{deb.name}' | tar -xO {tarball} "
                    f"| tar -xJ -C /lab/work/source --strip-components=1 --wildcards {folders}"
                )
            else:
                target = "image" if name in image_names else "headers"
                lines.append(f"dpkg-deb -x '/lab/work/debs/{deb.name}' /lab/work/{target}")
        for target in ("image", "headers"):
            lines.append(f"cd /lab/work/{target}; if [ -d lib ]; then mkdir -p usr; cp -a lib usr/; rm -r lib; fi")
        self._script("unpacking", "kernel-unpack", lines, {work: "/lab/work"})

    def _script(
        self, title: str, log: str, lines: list[str], binds: dict[Path, str], layers: tuple[Path, ...] = ()
    ) -> None:
        chroot = self.tree.chroot(binds=binds, layers=layers)
        self.progress.call(title, chroot.argv(["sh", "-ec", "\n".join(lines)]), self.cache.log(log))

    def _keep_image(self, partial: Path, work: Path, choice: KernelChoice) -> None:
        compressed = partial / "vmlinuz"
        shutil.copy(_part_of_image(work / "image", "vmlinuz", choice.release), compressed)
        shutil.copy(_part_of_image(work / "image", "config", choice.release), partial / "config")
        kind, payload = kernel_payload(compressed.read_bytes())
        plain = partial / "vmlinux"
        if kind == "xz":
            plain.write_bytes(lzma.decompress(payload))
        elif kind == "gzip":
            plain.write_bytes(zlib.decompress(payload, 31))
        elif kind == "zstd":
            (work / "payload").write_bytes(payload)
            lines = ["zstd -dqf /lab/work/payload -o /lab/work/vmlinux"]
            self._script("unpacking the kernel image", "kernel-vmlinux", lines, {work: "/lab/work"})
            shutil.move(work / "vmlinux", plain)
        if plain.exists() and plain.read_bytes()[:4] != b"\x7fELF":
            plain.unlink()

    def _build_modules(self, partial: Path, work: Path, choice: KernelChoice) -> None:
        stock = work / f"image/usr/lib/modules/{choice.release}"
        symbols = partial / "symbols"
        symbols.mkdir()
        for folder, modules, settings in BUILT:
            if all(list(stock.glob(f"kernel/**/{module}.ko*")) for module in modules):
                continue
            source = work / "source" / folder
            if folder in PLAIN_MAKEFILES:
                (source / "Makefile").write_text(PLAIN_MAKEFILES[folder])
            build_modules(self.tree, (work / "headers", symbols, choice.release), source, settings)
            (stock / "updates").mkdir(exist_ok=True)
            for module in modules:
                shutil.copy(source / f"{module}.ko", stock / "updates")
            shutil.copy(source / "Module.symvers", symbols / f"{modules[0]}.symvers")

    def _prepare_modules(self, partial: Path, stock: Path, release: str) -> None:
        """Make module indexes, and unpack those that a boot loads: under emulation, that is most of their cost."""
        binds = {stock: f"/usr/lib/modules/{release}"}
        for unwanted in ("build", "source"):
            (stock / unwanted).unlink(missing_ok=True)
        self._script("indexing the modules", "kernel-depmod", [f"depmod {release}"], binds)
        dependencies = parse_dependencies((stock / "modules.dep").read_text())
        lines = [f"cd /usr/lib/modules/{release}"]
        for path in load_order(dependencies, (*BOOT_MODULES, *RUN_MODULES)):
            plain = re.sub(r"\.(xz|zst|gz)$", "", path)
            unpack = {".xz": "xz -d", ".zst": "zstd -dq --rm", ".gz": "gzip -d"}.get(path.removeprefix(plain))
            if unpack:
                lines.append(f"{unpack} '{path}'")
            lines.append(f"strip --strip-debug '{plain}'")
        self._script("unpacking the modules for the boot", "kernel-modules", [*lines, f"depmod {release}"], binds)
        (partial / "boot").mkdir()
        dependencies = parse_dependencies((stock / "modules.dep").read_text())
        for number, path in enumerate(load_order(dependencies, BOOT_MODULES)):
            shutil.copy(stock / path, partial / f"boot/{number:02}-{Path(path).name}")


def build_modules(
    tree: Tree,
    against: tuple[Path, Path, str],
    source: Path,
    settings: tuple[str, ...] = (),
) -> None:
    """Build the modules of a folder in place, against (headers, symbols of modules built before, release)."""
    headers, symbols, release = against
    known = " ".join(f"/lab/symbols/{path.name}" for path in sorted(symbols.glob("*.symvers")))
    argv = ["make", "-C", f"/usr/src/linux-headers-{release}", "M=/lab/source", *settings]
    argv += [f"KBUILD_EXTRA_SYMBOLS={known}", "modules"]
    chroot = tree.chroot(layers=(headers,), binds={source: "/lab/source", symbols: "/lab/symbols"})
    log = tree.cache.log(f"build-{source.name}")
    tree.progress.call(f"building the modules of {source.name}", chroot.argv(argv), log)


def _part_of_image(image: Path, name: str, release: str) -> Path:
    """Return a file of an unpacked kernel package; newer packages keep it beside the modules."""
    places = (image / f"boot/{name}-{release}", image / f"usr/lib/modules/{release}/{name}")
    for place in places:
        if place.exists():
            return place
    raise LabError(
        f"the packages of kernel {release} hold no {name}",
        f"Looked for {' and '.join(str(place.relative_to(image)) for place in places)}.",
        "tools/lab setup --kernel 6.12",
    )


def kernel_payload(image: bytes) -> tuple[str, bytes]:
    """Return the compressed kernel inside a bzImage, and how it is compressed ("" when that is not known)."""
    if image[0x202:0x206] != b"HdrS":
        return "", b""
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    for magic, kind, trailer in ((b"\x28\xb5\x2f\xfd", "zstd", 4), (b"\xfd7zXZ", "xz", 4), (b"\x1f\x8b", "gzip", 0)):
        if payload.startswith(magic):
            return kind, payload[: length - trailer]
    return "", b""


def parse_dependencies(text: str) -> dict[str, list[str]]:
    """Read modules.dep: a module's path and the paths that it needs."""
    return {path: needs.split() for path, _, needs in (line.partition(":") for line in text.splitlines())}


def load_order(dependencies: dict[str, list[str]], names: tuple[str, ...]) -> list[str]:
    """Return the paths of modules and of all that they need, each after what it needs; built-in ones are absent."""
    by_name = {module_name(path): path for path in dependencies}
    result: list[str] = []
    for name in names:
        path = by_name.get(name)
        for step in [*reversed(dependencies[path]), path] if path else []:
            if step not in result:
                result.append(step)
    return result


def module_name(path: str) -> str:
    """Return the name by which the kernel knows the module in a file."""
    return Path(path).name.split(".")[0].replace("-", "_")


def no_kernel(wanted: str) -> LabError:
    """Return the error for a kernel that would have to be fetched first."""
    return LabError(f"no kernel in the cache fits --kernel {wanted}", "", f"tools/lab setup --kernel {wanted}")
