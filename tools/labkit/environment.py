"""The project's environment: the project built as a wheel in the lab's tree and installed into an image."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from labkit.cache import Cache, building, forget_old, hold
from labkit.images import make_image
from labkit.progress import Progress
from labkit.tree import Tree

INSIDE = "/opt/pyvhostvdpa"
PACKAGE = "pyvhostvdpa"
FILES = ("pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("cdefs", PACKAGE)
IGNORED_FOLDERS = {"__pycache__", "build", "dist"}
IGNORED_SUFFIXES = {".so", ".o", ".pyc"}
KEPT = 4


class Environment:
    """One build of the project, named by a hash of all that went into it."""

    def __init__(self, cache: Cache, tree: Tree, project: Path, progress: Progress) -> None:
        self.cache = cache
        self.tree = tree
        self.project = project
        self.progress = progress
        self.folder = cache.environments / f"{tree.identity()}-{self.identity()}"
        self.site = self.folder / "site"
        self.image = self.folder / "site.img"

    @property
    def exists(self) -> bool:
        """Whether the project has a package to build at all."""
        return (self.project / PACKAGE / "__init__.py").exists()

    @property
    def ready(self) -> bool:
        """Whether it is built."""
        return self.image.exists()

    def sources(self) -> Iterator[Path]:
        """Yield the files that the package is built from."""
        for name in FILES:
            if (self.project / name).is_file():
                yield self.project / name
        for folder in FOLDERS:
            for path in sorted((self.project / folder).rglob("*")):
                parts = path.relative_to(self.project).parts
                ignored = any(part in IGNORED_FOLDERS or part.endswith(".egg-info") for part in parts)
                if path.is_file() and not ignored and path.suffix not in IGNORED_SUFFIXES:
                    yield path

    def identity(self) -> str:
        """Return the hash of all sources."""
        digest = hashlib.sha256()
        for path in self.sources():
            data = path.read_bytes()
            digest.update(f"{path.relative_to(self.project)}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()[:12]

    def ensure(self) -> None:
        """Build the project unless this very state of it is built."""
        if not self.exists:
            self.progress.say(f"the project has no package {PACKAGE}/ yet; the VM runs without it")
            return
        if self.ready:
            hold(self.folder).touch()
            return
        with building(self.folder) as partial:
            self.install(partial)
            make_image(self.cache, self.progress, partial / "site", partial / "site.img", "writing the project's image")
        hold(self.folder)
        forget_old(self.cache.environments, KEPT)

    def install(self, partial: Path, log: Path | None = None) -> None:
        """Install the project into the folder `site` in another one; what that prints goes to a log."""
        source, site = partial / "source", partial / "site"
        site.mkdir()
        for path in self.sources():
            target = source / path.relative_to(self.project)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        argv = ["python3", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir"]
        argv += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", "/lab/site", "/lab/source"]
        chroot = self.tree.chroot(binds={source: "/lab/source", site: "/lab/site"})
        self.progress.call(
            "building the project",
            chroot.argv(argv),
            log or self.cache.log("build-project"),
            next_step="correct what the log names, then run the same command again",
        )
        shutil.rmtree(source)
