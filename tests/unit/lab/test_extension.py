"""The extension module of a copy in which one C file differs: what is compiled again, and where it goes."""

import subprocess
import sys

import pytest

from labkit.errors import LabError
from labkit.extension import SCRIPT, Extension

# Of setuptools what the script uses: each file that is compiled is told.
SETUPTOOLS = {
    "__init__.py": """
from pathlib import Path
from distutils.unixccompiler import UnixCCompiler

def setup(script_args):
    target, temporary = Path(script_args[3]), Path(script_args[5])
    temporary.mkdir(parents=True)
    objects = []
    for source in ("build/_cdefs.c", "cdefs/a.c", "cdefs/b.c"):
        objects.append(temporary / Path(source).with_suffix(".o").name)
        UnixCCompiler()._compile(str(objects[-1]), source, ".c", [], [], [])
    (target / "module.so").write_text("".join(path.read_text() for path in objects))
""",
    "../distutils/__init__.py": "",
    "../distutils/unixccompiler.py": """
from pathlib import Path

class UnixCCompiler:
    def _compile(self, made, source, *others):
        print(source)
        Path(made).write_text(f"<{Path(source).read_text()}>")
""",
}
EMIT = "from pathlib import Path\ndef emit(path):\n    path.parent.mkdir()\n    path.write_text('g')\n"


@pytest.fixture
def build(tmp_path):
    for name, text in SETUPTOOLS.items():
        path = tmp_path / "modules/setuptools" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "kept").mkdir()

    def run(how, **files):
        project = tmp_path / f"project{len(list(tmp_path.iterdir()))}"
        (project / "cdefs").mkdir(parents=True)
        (project / "target").mkdir()
        for name, text in {"a.c": "a", "b.c": "b", "build.py": EMIT, **files}.items():
            (project / "cdefs" / name).write_text(text)
        argv = [sys.executable, str(SCRIPT), how, str(tmp_path / "kept"), "target"]
        environment = {"PYTHONPATH": str(tmp_path / "modules")}
        done = subprocess.run(argv, cwd=project, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split(), (project / "target/module.so").read_text()

    return run


def test_only_what_differs_is_compiled_again(build):
    assert build("fill") == (["build/_cdefs.c", "cdefs/a.c", "cdefs/b.c"], "<g><a><b>")
    assert build("use", **{"b.c": "changed"}) == (["cdefs/b.c"], "<g><a><changed>")
    assert build("use") == ([], "<g><a><b>")


def test_objects_that_nobody_kept_are_an_error(tmp_path):
    recorder = Recorder()
    (tmp_path / "one").mkdir()
    with pytest.raises(LabError, match="no object was kept"):
        Extension(recorder, recorder, tmp_path / "kept").compile(tmp_path / "one/project")


class Recorder:
    """Stands for the tree and for what shows progress."""

    def chroot(self, binds, folder):
        self.binds = {inside: path for path, inside in binds.items()}
        assert folder == "/lab/source"
        return self

    def argv(self, words):
        return words

    def call(self, what, words, log):
        self.words = words
        made = self.binds["/lab/target"] / "pyvhostvdpa"
        made.mkdir()
        (made / "_cdefs.abi3.so").write_text("changed")


def test_module_of_a_change_takes_the_place_of_the_installed_one(tmp_path):
    copy, site = tmp_path / "one/project", tmp_path / "one/site"
    (site / "pyvhostvdpa").mkdir(parents=True)
    (site / "pyvhostvdpa/_cdefs.abi3.so").write_text("unchanged")
    recorder = Recorder()
    Extension(recorder, recorder, tmp_path / "kept").install(copy, site)
    assert recorder.words == ["python3", "/lab/scripts/rebuild.py", "use", "/lab/kept", "/lab/target"]
    assert (recorder.binds["/lab/source"], recorder.binds["/lab/kept"]) == (copy, tmp_path / "kept")
    assert (site / "pyvhostvdpa/_cdefs.abi3.so").read_text() == "changed"
