"""The cache folder: nothing half-made is taken for whole, and locks hold."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkit import cache as module
from labkit.cache import building, leftovers
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


def test_killed_set_up_is_recovered(cache):
    script = (
        "import sys, time; from labkit.cache import Cache, building; c = Cache()\n"
        "with c.setting_up(), building(c.trees / 'x') as p:\n"
        "    (p / 'half').write_text('x'); print('in', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TOOLS)}
    ) as child:
        assert child.stdout.readline() == b"in\n"
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
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TOOLS)}
    ) as child:
        assert child.stdout.readline() == b"in\n"
        begin = time.monotonic()
        with cache.setting_up():
            assert time.monotonic() - begin > 0.1


def test_clean_is_refused_while_in_use(cache):
    cache.create()
    (cache.root / "file").write_bytes(b"x" * 10000)
    with cache.in_use(), pytest.raises(LabError, match="running"):
        cache.clean()
    assert cache.root.exists()
    assert cache.clean() > 0
    assert not cache.root.exists()


def test_not_enough_space_is_said_before(cache):
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


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1500, "2 kB"), (279_000_000, "279 MB"), (2.5e9, "2.5 GB")])
def test_sizes(count, text):
    assert module.size(count) == text
