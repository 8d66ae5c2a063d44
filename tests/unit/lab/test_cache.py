"""The cache folder: nothing half-made is taken for whole, and locks hold."""

import errno
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from labkit import cache as module
from labkit.cache import building, leftovers, once
from labkit.errors import LabError

TOOLS = Path(module.__file__).parents[1]


def test_build_appears_only_when_whole(tmp_path):
    target = tmp_path / "a" / "tree"
    with building(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert not leftovers(tmp_path)


def _break(partial):
    (partial / "half").write_text("x")
    raise ZeroDivisionError


def test_failed_build_leaves_the_old_one_and_is_redone(tmp_path):
    target = tmp_path / "a" / "tree"
    with building(target) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), building(target) as partial:
        _break(partial)
    assert (target / "file").read_text() == "old"
    assert [path.name for path in leftovers(tmp_path)] == ["tree.partial"]
    with building(target) as partial:
        assert not list(partial.iterdir())
    assert not leftovers(tmp_path)


def test_full_disk_in_the_middle(tmp_path):
    with pytest.raises(LabError) as caught, building(tmp_path / "a" / "tree"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left" in caught.value.why
    assert "free some space" in caught.value.next_step


@contextmanager
def inside(script):
    """A process that has come to where its script prints "in"."""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TOOLS)}
    ) as child:
        assert child.stdout.readline() == b"in\n"
        yield child


def test_killed_set_up_is_recovered(cache):
    script = (
        "import sys, time; from labkit.cache import Cache, building; c = Cache()\n"
        "with c.setting_up(), building(c.trees / 'x') as p:\n"
        "    (p / 'half').write_text('x'); print('in', flush=True); time.sleep(60)\n"
    )
    with inside(script) as child:
        child.kill()
    assert [path.name for path in leftovers(cache.root)] == ["x.partial"]
    with cache.setting_up(), building(cache.trees / "x") as partial:
        assert not list(partial.iterdir())
    assert (cache.trees / "x").is_dir()


def test_second_set_up_waits_for_the_first(cache):
    script = (
        "from labkit.cache import Cache; import time\n"
        "with Cache().setting_up():\n    print('in', flush=True); time.sleep(0.3)\n"
    )
    with inside(script):
        begin = time.monotonic()
        with cache.setting_up():
            assert time.monotonic() - begin > 0.1


def test_clean_is_refused_while_in_use(cache):
    cache.create()
    (cache.logs / "file").write_bytes(b"x" * 10000)
    with cache.in_use(), pytest.raises(LabError, match="running"):
        cache.clean()
    assert cache.root.exists()
    assert cache.clean() > 0
    assert not cache.root.exists()


FOREIGN = {
    "files of its owner": ["thesis.txt"],
    "files with the lab's names": ["logs/mine.log", "results/mine.csv"],
    "an empty folder": [],
    "a lock of the lab and other files": ["setup.lock", "thesis.txt"],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_clean_removes_nothing_from_a_folder_that_the_lab_did_not_make(cache, case):
    cache.root.mkdir()
    for name in FOREIGN[case]:
        (cache.root / name).parent.mkdir(exist_ok=True)
        (cache.root / name).write_text("x")
    before = sorted(cache.root.rglob("*"))
    with pytest.raises(LabError, match="was not made by the lab; nothing is removed"):
        cache.clean()
    assert sorted(cache.root.rglob("*")) == before


def test_clean_leaves_what_others_put_into_the_labs_folder(cache):
    cache.create()
    (cache.logs / "file").write_bytes(b"x" * 100000)
    (cache.root / "thesis.txt").write_text("x")
    assert cache.clean() >= 100000
    assert [path.name for path in cache.root.iterdir()] == ["thesis.txt"]


def test_clean_does_not_follow_links_out_of_the_folder(cache, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("x")
    cache.create()
    (cache.root / "results").symlink_to(outside)
    cache.clean()
    assert (outside / "thesis.txt").exists()
    assert not cache.root.exists()


def test_folder_with_other_files_is_not_made_a_cache(cache):
    cache.root.mkdir()
    (cache.root / "logs").mkdir()
    (cache.root / "logs" / "mine.log").write_text("x")
    with pytest.raises(LabError, match="is not a cache folder of the lab"):
        cache.create()
    assert [path.name for path in cache.root.iterdir()] == ["logs"]


def test_cache_of_a_lab_without_a_marker_is_adopted_and_cleaned(cache):
    for name in ("trees", "kernels", "logs", "mnt"):
        (cache.root / name).mkdir(parents=True)
    (cache.root / "setup.lock").touch()
    cache.create()
    assert cache.clean() > 0
    assert not cache.root.exists()


def test_build_continues_where_it_failed(tmp_path):
    done = []

    def build(broken):
        with building(tmp_path / "a" / "tree", goes_on=True) as partial:
            once(partial, "first", lambda: done.append("first"))
            (partial / "file").write_text("x")
            if broken:
                raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            once(partial, "second", lambda: done.append("second"))

    for _ in range(2):
        with pytest.raises(LabError, match="failed while building tree"):
            build(broken=True)
    build(broken=False)
    assert done == ["first", "second"]
    assert [path.name for path in (tmp_path / "a" / "tree").iterdir()] == ["file"]


def test_step_that_failed_is_done_again(tmp_path):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        once(tmp_path, "step", fails)
    done = []
    once(tmp_path, "step", lambda: done.append(1))
    once(tmp_path, "step", lambda: done.append(2))
    assert done == [1]


def test_missing_disk_space_is_reported_before_the_step(cache):
    with pytest.raises(LabError) as caught:
        cache.require_space(1 << 60, "the tree")
    assert "not enough disk space" in caught.value.what
    assert "free" in caught.value.why


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be made"):
        module.Cache(tmp_path / "file" / "cache").create()


def test_logs_do_not_pile_up(cache):
    for number in range(60):
        cache.log(f"n{number}").write_text("x")
    assert len(list(cache.logs.iterdir())) <= module.KEPT_LOGS + 1


def test_a_log_that_another_process_drops_meanwhile_is_no_error(cache, monkeypatch):
    cache.create()
    for name in ("gone", "kept"):
        (cache.logs / f"{name}.log").write_text("")
    real = Path.stat

    def stat(path, **options):
        if path.name == "gone.log":
            path.unlink(missing_ok=True)
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert cache.log("new").name == "new.log"
    assert (cache.logs / "kept.log").exists()


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1500, "2 kB"), (279_000_000, "279 MB"), (2.5e9, "2.5 GB")])
def test_sizes(count, text):
    assert module.size(count) == text


def builds(folder, *names):
    """Make builds, each newer than those before it."""
    for age, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (age + 1, age + 1))


def test_the_newest_builds_are_kept(tmp_path):
    builds(tmp_path, "a", "b", "c", "d")
    module.forget_old(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]
    module.forget_old(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_build_that_a_process_holds_is_not_removed_before_that_ends(tmp_path):
    builds(tmp_path, "a", "b", "c", "d")
    program = "import sys; from labkit.cache import *; hold(Path(sys.argv[1])); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "a"],
        env={**os.environ, "PYTHONPATH": str(TOOLS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        module.forget_old(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
        other.stdin.close()
    module.forget_old(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_a_build_that_is_held_here_is_not_removed_either(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_held", {})
    builds(tmp_path, "a", "b")
    assert module.hold(module.hold(tmp_path / "a")) == tmp_path / "a"
    module.forget_old(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    [descriptor] = module._held.values()
    os.close(descriptor)


def test_every_kind_of_build_is_removed_in_this_one_way():
    for path in (TOOLS / "labkit").glob("*.py"):
        text = path.read_text()
        assert ("[KEPT:]" in text, "forget_old(" in text) in ((False, False), (False, True)), path


def test_a_folder_that_another_process_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    builds(tmp_path, "old")
    real = module.shutil.rmtree

    def other_was_first(path):
        real(path)
        real(path)

    monkeypatch.setattr(module.shutil, "rmtree", other_was_first)
    module.remove(tmp_path / "old")
    assert not (tmp_path / "old").exists()
