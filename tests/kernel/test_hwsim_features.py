"""What vhost-vdpa offers on vdpa_hwsim, and how each kernel or firmware that lacks something is imitated."""

from __future__ import annotations

import hwsim
import pytest

from pyvhostvdpa.base.errors import KernelError
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.chardev.door import VhostVdpa

pytestmark = pytest.mark.smoke

EVERYTHING = BackendFeature(0x1FE)
PARAMETERS = {
    "suspend": BackendFeature.SUSPEND,
    "resume": BackendFeature.RESUME,
    "enable_after_driver_ok": BackendFeature.ENABLE_AFTER_DRIVER_OK,
    "desc_asid": BackendFeature.DESC_ASID,
    "persist": BackendFeature.IOTLB_PERSIST,
}


def offered(**parameters: object) -> BackendFeature:
    sim = hwsim.add("hw0", **parameters)
    try:
        with VhostVdpa(sim.chardev) as device:
            return device.get_backend_features()
    finally:
        hwsim.remove(sim.name)


def test_every_backend_feature_is_offered() -> None:
    assert offered() == EVERYTHING


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_backend_feature_of_the_parent_can_be_switched_off_alone(parameter: str) -> None:
    assert offered(**{parameter: "N"}) == EVERYTHING & ~PARAMETERS[parameter]


def test_backend_features_of_the_parent_can_all_be_switched_off() -> None:
    """The remaining ones are those of the vhost core: MSG_V2, BATCH and ASID."""
    assert offered(**dict.fromkeys(PARAMETERS, "N")) == BackendFeature(0xE)


def test_asid_without_its_parts_is_not_usable() -> None:
    """One group in one address space: the bit stays, and there is nothing to bind."""
    sim = hwsim.add("hw0", single_group="Y", nas=1)
    try:
        with VhostVdpa(sim.chardev) as device:
            device.set_owner()
            assert (device.get_group_num(), device.get_as_num()) == (1, 1)
            assert [device.get_vring_group(index) for index in range(3)] == [0, 0, 0]
            with pytest.raises(KernelError, match="SET_GROUP_ASID"):
                device.set_group_asid(0, 1)
    finally:
        hwsim.remove(sim.name)
