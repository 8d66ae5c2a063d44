"""Values that users give, and what a machine has of what they ask for."""

import pytest

from labkit import ladder, values
from labkit.errors import LabError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB of memory and 2 GiB of swap, in a control group without limits."""
    (tmp_path / "meminfo").write_text("MemTotal:        8388608 kB\nMemFree: 1 kB\nSwapTotal:       2097152 kB\n")
    (tmp_path / "cgroup").write_text("0::/system.slice/job\n")
    (tmp_path / "fs/system.slice/job").mkdir(parents=True)
    for folder in ("system.slice", "system.slice/job"):
        (tmp_path / "fs" / folder / "memory.max").write_text("max\n")
    for name, path in (("MEMINFO", "meminfo"), ("CGROUP", "cgroup"), ("CGROUPS", "fs")):
        monkeypatch.setattr(values, name, tmp_path / path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 << 30), ("2500M", 2500 << 20), ("512", 512 << 20), ("1GiB", 1 << 30)],
)
@pytest.mark.usefixtures("machine")
def test_size_is_read_as_qemu_reads_it(text, size):
    assert values.memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-4G", "4.5G", "4X", "inf", "1e4", "0x100M"])
@pytest.mark.usefixtures("machine")
def test_size_value_that_is_invalid_is_refused(text):
    with pytest.raises(LabError, match="this is not a size"):
        values.memory(text)


@pytest.mark.usefixtures("machine")
def test_memory_beyond_that_of_the_machine_is_refused_with_its_size():
    assert values.memory("10G") == 10 << 30
    with pytest.raises(LabError, match="does not fit") as caught:
        values.memory("11G")
    assert "Memory and swap of this machine are 10.7 GB" in caught.value.why
    assert caught.value.next_step == "--memory 5120M"


def test_limit_of_an_outer_control_group_counts(machine):
    (machine / "fs/system.slice/memory.max").write_text(f"{2 << 30}\n")
    with pytest.raises(LabError, match="does not fit") as caught:
        values.memory("4G")
    assert "control group" in caught.value.why
    assert values.memory("2G") == 2 << 30


@pytest.mark.usefixtures("machine")
def test_ladder_that_the_machine_cannot_hold_is_refused():
    with pytest.raises(LabError, match="does not fit"):
        ladder.request(["--memory", "9G"], "6.12", None)


@pytest.mark.parametrize("word", ["--cpus", "--devices=vdpa_sim_net:2", "--accel", "--env", "--icount"])
def test_ladder_refuses_options_of_run(word):
    with pytest.raises(LabError, match="ladder takes no --"):
        ladder.request([word], "6.12", None)


def test_report_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be made"):
        ladder.request(["--report", str(tmp_path / "file")], "6.12", None)


def test_variables_for_the_command():
    environ = {"MINE": "1"}
    assert values.variables(["MINE", "OTHER", "A=b=c", "EMPTY="], environ) == {"MINE": "1", "A": "b=c", "EMPTY": ""}


@pytest.mark.parametrize("word", ["=x", "", "="])
def test_variable_without_a_name_is_refused(word):
    with pytest.raises(LabError, match="there is no name"):
        values.variables([word])
