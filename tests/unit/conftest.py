from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
# what both kinds of tests use lies there
sys.path.append(str(Path(__file__).parents[1] / "kernel"))

from door_double import OFFERED, PAIRS, DoorDouble
from ring_model import Model
from stub_migration import Rig

from pyvhostvdpa import GuestMemory, VdpaNetDevice
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.device import opened as opening
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, Feature

# how long it takes to draw an example is the load of the machine
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any machine")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A guest on a stub device, ready to be sent."""
    made = Rig(tmp_path)
    yield made
    made.close()


@pytest.fixture
def model() -> Iterator[Callable[..., Model]]:
    """Make rings to play with; they are closed at the end."""
    made: list[Model] = []

    def make(**options: int) -> Model:
        made.append(Model(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> list[DoorDouble]:
    """The doors of the devices that a test opens."""
    made: list[DoorDouble] = []
    monkeypatch.setattr(opening, "VhostVdpa", lambda path, trace: made[-1])
    monkeypatch.setattr(opening, "check_path", lambda path: None)
    monkeypatch.setattr(opening, "check_served", lambda path: None)
    monkeypatch.setattr(
        opening, "parent_of", lambda path: SimpleNamespace(pinned=False, pins_for_certain=False, max_iotlb_entries=None)
    )
    return made


@pytest.fixture
def opened(doors: list[DoorDouble], nic: GuestNic) -> Iterator[Callable[..., VdpaNetDevice]]:
    """Open a device whose features have not been negotiated; it is closed before memory is."""
    devices: list[VdpaNetDevice] = []

    def make(
        advertised: BackendFeature = ALL_BACKEND_FEATURES, wanted: Feature | None = None, shadow: str | None = None
    ) -> VdpaNetDevice:
        doors.append(DoorDouble(OFFERED, advertised))
        devices.append(VdpaNetDevice("/dev/vhost-vdpa-double", wanted=wanted, shadow=shadow))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(DEFAULT_GPA, 2 << 20)]) as made:
        yield made


@pytest.fixture
def nic(memory: GuestMemory) -> Iterator[GuestNic]:
    options = NicOptions(pairs=PAIRS, ring_size=8, features=SUPPORTED | CONTROL, control_index=2 * PAIRS)
    with closing(GuestNic(memory, options)) as made:
        yield made
