"""`--devices`: what is made of it, and what is refused."""

import pytest

from labkit import devices
from labkit.errors import LabError


def test_default_is_two_network_devices():
    plan = devices.parse([])
    assert plan.count == 2
    assert plan.modules() == [("vdpa_sim", []), ("vdpa_sim_net", [])]
    assert plan.additions() == [
        ["name", "vdpa0", "mgmtdev", "vdpasim_net", "mac", "52:54:91:a1:b2:c1"],
        ["name", "vdpa1", "mgmtdev", "vdpasim_net", "mac", "52:54:91:a1:b2:c2"],
    ]


def test_options_go_where_they_belong():
    plan = devices.parse(["vdpa_sim_net:1,use_va=0,batch_mapping=0,mtu=9000,mac=52:54:00:00:00:fe"])
    assert plan.modules() == [("vdpa_sim", ["use_va=0", "batch_mapping=0"]), ("vdpa_sim_net", [])]
    assert plan.additions() == [["name", "vdpa0", "mgmtdev", "vdpasim_net", "mac", "52:54:00:00:00:fe", "mtu", "9000"]]


def test_several_kinds_share_their_modules():
    plan = devices.parse(["vdpa_sim_net:1,use_va=0", "vdpa_sim_blk:1,use_va=0"])
    assert plan.modules() == [("vdpa_sim", ["use_va=0"]), ("vdpa_sim_net", []), ("vdpa_sim_blk", [])]
    assert [words[1] for words in plan.additions()] == ["vdpa0", "vdpa1"]


def test_several_groups_get_different_macs():
    plan = devices.parse(["vdpa_sim_net:2", "vdpa_sim_net"])
    assert len({words[5] for words in plan.additions()}) == 3


def test_default_macs_have_no_zero_byte():
    plan = devices.parse(["vdpa_sim_net:14"])
    assert all("00" not in words[5].split(":") for words in plan.additions())


def test_a_daemon_is_given_what_the_management_device_does_not_take():
    plan = devices.parse(["vdpa_sim_net", "vduse:2"])
    assert plan.modules()[-1] == ("vduse", [])
    assert plan.additions()[1:] == [["name", f"vdpa{n}", "mgmtdev", "vduse"] for n in (1, 2)]
    macs = ["vdpa1=52:54:91:a1:b2:c2", "vdpa2=52:54:91:a1:b2:c3"]
    assert plan.daemons() == [["python3", "tools/vduse_net.py", "--background", *macs]]


def test_a_module_without_devices_is_loaded_for_those_made_later():
    plan = devices.parse(["vdpa_sim_net:0"])
    assert (plan.count, plan.additions()) == (0, [])
    assert plan.modules() == [("vdpa_sim", []), ("vdpa_sim_net", [])]


def test_devices_option_none_means_no_devices():
    assert devices.parse(["none"]).count == 0


@pytest.mark.parametrize(
    "text",
    [
        "vdpa_magic:1",
        "vdpa_sim_net:100",
        "vdpa_sim_net:many",
        "vdpa_sim_net:1,colour=red",
        "vdpa_sim_net:1,use_va",
        "vdpa_sim_net:1,mac=1:2",
        "vdpa_sim_blk:1,mac=52:54:91:a1:b2:c1",
    ],
)
def test_refused(text):
    with pytest.raises(LabError, match="--devices"):
        devices.parse([text])


def test_module_parameter_with_two_values_is_refused():
    plan = devices.parse(["vdpa_sim_net:1,use_va=0", "vdpa_sim_blk:1,use_va=1"])
    with pytest.raises(LabError, match="use_va=0 and with use_va=1"):
        plan.modules()


def test_a_count_of_0_loads_the_modules_and_makes_no_device():
    plan = devices.parse(["vdpa_sim_net:0"])
    assert plan.count == 0
    assert [module for module, _ in plan.modules()] == ["vdpa_sim", "vdpa_sim_net"]
