"""Kernel modules of the project's own, built when a run asks for a kind of device that needs them."""

import contextlib
import hashlib
import shutil
from pathlib import Path

from labkit.cache import building, forget_old, hold
from labkit.devices import DevicePlan, Kind
from labkit.errors import LabError
from labkit.kernel import Kernel, build_modules
from labkit.tree import Tree

SOURCES = {".c", ".h", ""}
KEPT = 4


def own_kinds(plan: DevicePlan) -> list[Kind]:
    """Return the kinds whose module is the project's own."""
    return list({group.kind.name: group.kind for group in plan.groups if group.kind.source}.values())


def build_own(tree: Tree, kernel: Kernel, project: Path, plan: DevicePlan) -> dict[str, Path]:
    """Return the project's own modules that a plan needs, by name; build those that are not built."""
    result: dict[str, Path] = {}
    for kind in own_kinds(plan):
        folder = _built(tree, kernel, kind, project)
        result |= {path.stem: path for path in sorted(folder.glob("*.ko"))}
    return result


def own_sources(name: str, folder: Path | None) -> list[Path]:
    """Return the files that the project's own module for a kind of device is built from."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in SOURCES and path.is_file()] if folder else []
    if not paths:
        raise LabError(f"the sources of the module for {name} are not there", f"Looked in {folder}.", "git status")
    return paths


def _built(tree: Tree, kernel: Kernel, kind: Kind, project: Path) -> Path:
    sources = own_sources(kind.name, kind.project_source(project))
    digest = hashlib.sha256()
    for path in sources:
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    target = kernel.folder / "own" / f"{kind.name}-{digest.hexdigest()[:12]}"
    with contextlib.suppress(FileNotFoundError):
        return hold(target)
    with tree.cache.setting_up(), building(target) as partial:
        source = partial / kind.name
        source.mkdir()
        for path in sources:
            shutil.copyfile(path, source / path.name)
        build_modules(tree, (kernel.headers, kernel.symbols, kernel.release), source)
        script = "cd /lab/source && strip --strip-debug *.ko"
        chroot = tree.chroot(binds={source: "/lab/source"})
        log = tree.cache.log(f"strip-{kind.name}")
        tree.progress.call("stripping it", chroot.argv(["sh", "-c", script]), log)
        for path in source.glob("*.ko"):
            path.rename(partial / path.name)
        shutil.rmtree(source)
    hold(target)
    forget_old(target.parent, KEPT)
    return target
