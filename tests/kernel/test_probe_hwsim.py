"""What no stock device has: descriptor groups, doorbells, and features that are not what they say."""

from __future__ import annotations

import time
from collections.abc import Iterator

import hwsim
import lab
import pytest
from conftest import RunningGuest
from test_ioctls import run_case

from pyvhostvdpa import BackendFeature, GuestMemory, VdpaNetDevice
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.probe.probe import probe

EVERYTHING = BackendFeature(0x1FE)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[hwsim.HwSim]:
    """A vdpa_hwsim device; its parameters come from the test."""
    made = hwsim.add("hw0", **getattr(request, "param", {}))
    yield made
    hwsim.remove(made.name)


@pytest.mark.smoke
def test_every_backend_feature_is_proved(device: hwsim.HwSim) -> None:
    told = probe(device.chardev, verify=True).to_dict()
    features = told["backend_features"]
    assert [features[name] for name in ("advertised", "usable", "proved")] == ["0x1fe"] * 3, features["why"]
    assert told["vring_groups"] == [0, 0, 1]
    assert told["vring_desc_groups"] == [2, 2, 1]
    assert (told["group_num"], told["as_num"]) == (3, 2)
    assert told["parent"]["pinned"]
    assert told["migratable"]
    assert all(answer["yes"] for answer in told["enables"].values())


LIES = {
    "lie_persist": BackendFeature.IOTLB_PERSIST,
    "lie_suspend": BackendFeature.SUSPEND | BackendFeature.RESUME,
    "lie_resume": BackendFeature.RESUME,
    "lie_desc_asid": BackendFeature.DESC_ASID,
    "lie_enable": BackendFeature.ENABLE_AFTER_DRIVER_OK,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught(device: hwsim.HwSim, lie: str) -> None:
    device.write(f"fault/{lie}", 1)
    found = probe(device.chardev, verify=True)
    assert found.backend.usable == EVERYTHING
    assert found.backend.proved == EVERYTHING & ~LIES[lie], found.backend.why
    assert [told.partition(":")[0] for told in found.lies()] == [f.name for f in BackendFeature if f in LIES[lie]]
    if lie == "lie_suspend":
        assert "no SUSPEND" in found.blockers()[0]


@pytest.mark.parametrize(
    ("device", "lacking"),
    [
        ({"suspend": "N"}, BackendFeature.SUSPEND),
        ({"resume": "N"}, BackendFeature.RESUME),
        ({"desc_asid": "N"}, BackendFeature.DESC_ASID),
        ({"persist": "N"}, BackendFeature.IOTLB_PERSIST),
        ({"enable_after_driver_ok": "N"}, BackendFeature.ENABLE_AFTER_DRIVER_OK),
    ],
    indirect=["device"],
)
def test_probe_feature_not_advertised_is_not_usable(device: hwsim.HwSim, lacking: BackendFeature) -> None:
    found = probe(device.chardev)
    assert lacking not in found.backend.advertised
    assert lacking not in found.backend.usable
    assert found.backend.why[lacking.name or ""] == "not advertised"


@pytest.mark.parametrize("device", [{"nas": 1}, {"single_group": "Y"}], indirect=True)
def test_a_device_without_groups_or_address_spaces_isolates_nothing(device: hwsim.HwSim) -> None:
    found = probe(device.chardev)
    assert BackendFeature.DESC_ASID not in found.backend.usable
    assert not found.enables()["cvq_isolation"].yes
    assert any("control queue cannot be shadowed" in blocker for blocker in found.blockers())


@pytest.mark.parametrize("device", [{"base_avail": "Y"}, {"dma_map": "Y"}, {"inflight": 4}], indirect=True)
def test_other_kinds_of_parents_are_proved_as_well(device: hwsim.HwSim) -> None:
    found = probe(device.chardev, verify=True)
    assert found.backend.proved == EVERYTHING, found.backend.why


def test_requests_that_only_this_parent_serves(device: hwsim.HwSim) -> None:
    run_case(device.chardev, "VHOST_VDPA_GET_VRING_DESC_GROUP", lambda dev: dev.get_vring_desc_group(0))
    run_case(device.chardev, "VHOST_VDPA_GET_VRING_SIZE", lambda dev: dev.get_vring_size(0))


@pytest.mark.parametrize("device", [{"doorbell_us": 100}], indirect=True)
def test_a_doorbell_that_is_rung_notifies_the_device(device: hwsim.HwSim) -> None:
    with GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory, VdpaNetDevice(device.chardev) as dev:
        dev.attach(memory)
        guest = RunningGuest(dev, memory)
        dev.start_passthrough(guest.nic.queues)
        for queue in guest.nic.queues:
            dev.chardev.set_vring_kick(queue.index, -1)
        time.sleep(0.1)
        guest.traffic.run()
        time.sleep(0.2)
        assert guest.nic.counts().received == 0
        with dev.chardev.mmap_doorbell(1) as page:
            page[0:2] = (1).to_bytes(2, "little")
            lab.wait_for(lambda: guest.nic.counts().received > 0, "frames after the doorbell")
        guest.close()
