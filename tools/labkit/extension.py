"""The extension module of copies of the project that differ in a C file: only that file is compiled again."""

import shutil
from pathlib import Path

from labkit.environment import PACKAGE
from labkit.errors import LabError
from labkit.progress import Progress
from labkit.tree import Tree

SCRIPT = Path(__file__).with_name("guest") / "rebuild.py"


class Extension:
    """Objects of the unchanged project, in a folder, and what is linked of them and of one that changed."""

    def __init__(self, tree: Tree, progress: Progress, folder: Path) -> None:
        self.tree = tree
        self.progress = progress
        self.kept = folder

    def compile(self, copy: Path) -> None:
        """Compile an unchanged copy of the project, and keep its objects; LabError if that fails."""
        self.kept.mkdir()
        self._build("fill", copy)
        if not any(self.kept.rglob("*.o")):
            raise LabError("no object was kept", f"setuptools compiles in another way than {SCRIPT.name} knows.")

    def install(self, copy: Path, site: Path) -> None:
        """Put the extension module of a changed copy in an installed package; LabError if it cannot be built."""
        made = list((self._build("use", copy) / PACKAGE).glob("*.so"))
        if not made or not all((site / PACKAGE / module.name).exists() for module in made):
            names = ", ".join(module.name for module in made) or "none"
            raise LabError("the extension module has another name than the installed one", f"What was built: {names}")
        for module in made:
            shutil.copyfile(module, site / PACKAGE / module.name)

    def _build(self, how: str, copy: Path) -> Path:
        target = copy.parent / "extension"
        target.mkdir()
        binds = {copy: "/lab/source", target: "/lab/target", self.kept: "/lab/kept", SCRIPT.parent: "/lab/scripts"}
        chroot = self.tree.chroot(binds=binds, folder="/lab/source")
        argv = chroot.argv(["python3", f"/lab/scripts/{SCRIPT.name}", how, "/lab/kept", "/lab/target"])
        self.progress.call("building the extension module", argv, copy.parent / "build.log")
        return target
