"""A set-up: what an interrupted one left, and which part of it the next one uses."""

import pytest

from labkit.cache import DONE
from labkit.progress import Progress
from labkit.session import Session


@pytest.fixture
def session(cache):
    cache.create()
    return Session(Progress(), cache)


def leave(folder, done):
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    if done:
        (partial / DONE).mkdir()
    return partial


def test_set_up_continues_with_what_it_needs_and_removes_the_rest(session, capsys):
    cache = session.cache
    kept = [
        leave(session.tree.folder, done=True),
        leave(cache.kernels / "6.12.118+deb13-amd64", done=True),
    ]
    gone = [
        leave(cache.trees / "another-recipe", done=True),
        leave(cache.kernels / "6.1.0-40-amd64", done=True),
        leave(cache.kernels / "6.12.9-amd64", done=False),
        leave(cache.environments / "some", done=False),
    ]
    session._look_at_leftovers("6.12")
    assert [path.exists() for path in (*kept, *gone)] == [True] * len(kept) + [False] * len(gone)
    said = capsys.readouterr().err
    assert said.count("continuing an interrupted set-up") == len(kept)
    assert said.count("removing") == len(gone)


def test_tree_is_not_fetched_again_when_a_later_step_failed(session, monkeypatch):
    """Stand-ins for the steps, which take minutes and the network."""
    steps, tree = [], session.tree
    monkeypatch.setattr(tree, "_bootstrap", lambda root: steps.append("bootstrap") or root.mkdir())

    def packages(_):
        steps.append("packages")
        if len(steps) == 2:
            raise OSError("the index cannot be reached")

    monkeypatch.setattr(tree, "_python_packages", packages)
    monkeypatch.setattr("labkit.tree.make_image", lambda _c, _p, _f, image, _t: image.write_text("x"))
    with pytest.raises(Exception, match="failed while building"):
        tree.ensure()
    session._look_at_leftovers("6.12")
    tree.ensure()
    assert steps == ["bootstrap", "packages", "packages"]
    assert tree.ready
    assert not (tree.folder / DONE).exists()
