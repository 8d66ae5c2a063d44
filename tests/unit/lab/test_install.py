"""The README's commands for installing, as they are read for the trial on bare trees; and what is handed on."""

import re
import tomllib

from labkit import install, package
from labkit.bare import BARE, BUILDING
from labkit.session import PROJECT

README = (PROJECT / "README.md").read_text()
DEBIAN = PROJECT / "tools" / "packaging" / "debian"


def test_readme_shows_the_package_the_wheel_and_the_source():
    found = {way.name: way for way in install.ways(README)}
    assert list(found) == ["deb", "whl", "pip install ."]
    assert [way.packages for way in found.values()] == [["deb"], ["wheel"], []]
    assert found["deb"].commands[-1] == "apt install ./dist/*.deb"


def test_script_of_a_way_has_its_commands_word_by_word():
    for way in install.ways(README):
        script = way.script(BARE[0])
        assert all(line in script.splitlines() for line in way.commands if not line.startswith(install.PACKAGE))
        assert "gcc" not in script or way.name == "pip install ."
        assert ("man $page" in script) == (way.name == "deb")


def test_facts_are_read_by_ansible_and_node_exporter_where_they_are():
    [way] = [way for way in install.ways(README) if way.name == "deb"]
    assert ["ansible localhost" in way.script(recipe) for recipe in BARE] == [False, True]


def test_packages_that_the_readme_installs_are_in_the_trees_without_a_network():
    words = re.findall(r"^    apt install (.*)$", README, re.MULTILINE)
    named = {word for line in words for word in line.split() if not word.startswith("./")}
    assert named
    for recipe in BARE:
        assert named <= set(recipe.downloaded)


def test_another_recipe_is_another_tree():
    assert len({recipe.identity() for recipe in (*BARE, BUILDING)}) == 3


def test_versions_of_the_packages_agree():
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert package.version() == version
    assert (DEBIAN / "changelog").read_text().startswith(f"pyvhostvdpa ({version}-1) ")


def test_debian_package_depends_on_what_the_wheel_depends_on():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z-]+", each)[0] for each in project["dependencies"]}
    control = (DEBIAN / "control").read_text()
    depends = re.search(r"^Depends: (.*?)^\S", control, re.MULTILINE | re.DOTALL)[1]
    assert all(f"python3-{name}" in depends for name in names)
