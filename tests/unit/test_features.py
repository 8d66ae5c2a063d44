"""What may be negotiated: nothing that this package does not implement, whichever caller asks for it."""

from __future__ import annotations

import pytest

from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.device.net import VdpaNetDevice
from pyvhostvdpa.net.features import CONTROL, IMPLEMENTED, REQUIRED, SUPPORTED, Feature, negotiate

EVERYTHING = (1 << 64) - 1
UNIMPLEMENTED = [
    Feature.RING_PACKED,
    Feature.IN_ORDER,
    Feature.NOTIFICATION_DATA,
    Feature.RING_RESET,
    Feature.SR_IOV,
    Feature.STANDBY,
    Feature.RSC_EXT,
]


@pytest.mark.parametrize("bit", UNIMPLEMENTED, ids=lambda bit: str(bit.name))
def test_negotiate_of_an_unimplemented_feature_is_refused_by_its_name(bit: Feature) -> None:
    with pytest.raises(MissingFeature, match=f"not implemented.*{bit.name}"):
        negotiate(EVERYTHING, SUPPORTED | bit)


def test_device_with_an_unimplemented_feature_wanted_is_refused_before_it_is_opened() -> None:
    with pytest.raises(MissingFeature, match="RING_PACKED"):
        VdpaNetDevice("/dev/null", wanted=SUPPORTED | Feature.RING_PACKED)


def test_negotiate_of_an_unknown_bit_is_refused_by_its_number() -> None:
    with pytest.raises(MissingFeature, match="bit 41"):
        negotiate(EVERYTHING, SUPPORTED | Feature(1 << 41))


def test_negotiate_names_only_the_bits_that_are_not_implemented() -> None:
    with pytest.raises(MissingFeature) as refused:
        negotiate(EVERYTHING, Feature(EVERYTHING))
    assert "RING_PACKED" in str(refused.value)
    assert "VERSION_1" not in str(refused.value)


def test_negotiate_with_a_device_that_offers_everything_takes_what_was_wanted() -> None:
    assert negotiate(EVERYTHING) == SUPPORTED
    assert negotiate(EVERYTHING, IMPLEMENTED) == IMPLEMENTED
    assert negotiate(EVERYTHING, CONTROL) == CONTROL | REQUIRED
