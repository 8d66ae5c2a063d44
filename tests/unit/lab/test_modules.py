"""Modules of the project's own: which kinds need one, and the error when its sources are missing."""

import pytest

from labkit import modules
from labkit.cache import Cache
from labkit.devices import DevicePlan, Group, Kind
from labkit.errors import LabError
from labkit.kernel import Kernel
from labkit.progress import Progress
from labkit.tree import Tree

OWN = Kind("own", ("own",), "own", {}, source="tools/own")
STOCK = Kind("stock", ("stock",), "stock", {})


def test_only_own_kinds_are_built():
    assert modules.own_kinds(DevicePlan([Group(STOCK, 1), Group(OWN, 1), Group(OWN, 2)])) == [OWN]


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "tools/own").mkdir(parents=True)
    tree = Tree(Cache(tmp_path / "cache"), Progress())
    with pytest.raises(LabError, match="sources of the module for own"):
        modules.build_own(tree, Kernel(tmp_path / "kernel"), tmp_path, DevicePlan([Group(OWN, 1)]))
