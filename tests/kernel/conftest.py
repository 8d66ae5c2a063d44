from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hwsim
import lab
from hw_guest import HwGuest, Make
from hwsim import HwSim, MakeSim

from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.device.net import VdpaNetDevice
from pyvhostvdpa.device.shadowing import FULL, USED
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.memory.pinned import pinned_bytes
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, Feature

NOTHING = BackendFeature(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests on the same kind of device together: loading the module anew takes seconds."""
    kinds = ("pinned", "unbatched")
    items.sort(key=lambda item: [kind in getattr(item, "fixturenames", ()) for kind in kinds])


def _mine(items: list[pytest.Item], claims: Path) -> Iterator[pytest.Item]:
    """The tests of the files that no other VM has taken; a file is taken when its first test is reached."""
    taken: dict[Path, bool] = {}
    for item in items:
        if item.path not in taken:
            try:
                (claims / item.path.stem).mkdir()
                taken[item.path] = True
            except FileExistsError:
                taken[item.path] = False
        if taken[item.path]:
            yield item


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Share the files with other VMs, if the lab says where claims are made; each test has what it has alone."""
    claims = os.environ.get("PYVHOSTVDPA_CLAIMS")
    if not claims or session.testsfailed or session.config.option.collectonly:
        return None
    mine = _mine(session.items, Path(claims))
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    return True


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Descriptors, pinned pages and threads are as many afterwards as before."""
    before = lab.open_fds(), pinned_bytes(), threading.enumerate()
    yield
    assert (lab.open_fds(), pinned_bytes(), threading.enumerate()) == before


@pytest.fixture(scope="session")
def loaded() -> dict[str, int]:
    """The parameters that vdpa_sim is loaded with; empty for the lab's own."""
    return {}


def _use(loaded: dict[str, int], **parameters: int) -> None:
    if loaded != parameters:
        lab.reload(**parameters)
        loaded.clear()
        loaded.update(parameters)


@pytest.fixture
def devices(loaded: dict[str, int]) -> tuple[str, str]:
    """Two vdpa_sim_net devices as they are by default: user addresses, set_map."""
    _use(loaded)
    return lab.DEVICES


@pytest.fixture
def fresh(loaded: dict[str, int]) -> tuple[str, str]:
    """The same, made anew, whatever is left of a guest that was killed on them."""
    loaded.clear()
    lab.reload()
    return lab.DEVICES


@pytest.fixture
def pinned(loaded: dict[str, int]) -> tuple[str, str]:
    """Two vdpa_sim_net devices that pin pages, as hardware does."""
    _use(loaded, use_va=0)
    return lab.DEVICES


@pytest.fixture
def unbatched(loaded: dict[str, int]) -> tuple[str, str]:
    """Two vdpa_sim_net devices whose parent maps piece by piece (dma_map), not an address space at a time."""
    _use(loaded, batch_mapping=0)
    return lab.DEVICES


@pytest.fixture(scope="module")
def vduse_device() -> Iterator[str]:
    """A net device of a user-space daemon (VDUSE): no control queue, no suspend, one address space."""
    with lab.vduse("loop0") as path:
        yield path


@pytest.fixture
def vduse(vduse_device: str) -> str:
    """The same, one for all tests of a module: its daemon outlives each of them."""
    return vduse_device


class RunningGuest:
    """A guest on a device, with traffic."""

    def __init__(self, device: VdpaNetDevice, memory: GuestMemory) -> None:
        self.device, self.memory = device, memory
        self.nic = GuestNic(memory, NicOptions(rx_relayed=device.shadow == USED))
        self.traffic = Traffic(self.nic)

    def close(self) -> None:
        self.traffic.pause()
        self.device.close()
        self.nic.close()

    def receives(self, frames: int = 500, seconds: float = 30.0) -> None:
        """Wait until that many more frames came back."""
        goal = self.nic.counts().received + frames
        lab.wait_for(lambda: self.nic.counts().received >= goal, f"{frames} frames", seconds)

    def settle(self) -> None:
        """Let everything sent arrive, and demand a perfect account."""
        assert self.traffic.stop_sending(20.0)
        counts = self.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0)


def _guest(path: str, without: BackendFeature) -> Iterator[RunningGuest]:
    with (
        GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory,
        VdpaNetDevice(path, use=ALL_BACKEND_FEATURES & ~without, shadow=FULL) as device,
    ):
        device.attach(memory)
        guest = RunningGuest(device, memory)
        yield guest
        guest.close()


@pytest.fixture
def guest(devices: tuple[str, str]) -> Iterator[RunningGuest]:
    """A guest attached to the first device, not started."""
    yield from _guest(devices[0], NOTHING)


@pytest.fixture
def pinned_guest(pinned: tuple[str, str]) -> Iterator[RunningGuest]:
    """The same on a device that pins."""
    yield from _guest(pinned[0], NOTHING)


@pytest.fixture
def forgetful_guest(devices: tuple[str, str]) -> Iterator[RunningGuest]:
    """The same on a device whose maps are lost at reset (IOTLB_PERSIST not acknowledged)."""
    yield from _guest(devices[0], BackendFeature.IOTLB_PERSIST)


@pytest.fixture
def make_sim() -> Iterator[MakeSim]:
    """Make vdpa_hwsim devices with the given parameters."""
    with ExitStack() as stack:
        made: list[HwSim] = []

        def build(pairs: int = 1, **parameters: object) -> HwSim:
            sim = hwsim.add(f"hw{len(made)}", pairs, **parameters)
            made.append(sim)
            stack.callback(hwsim.remove, sim.name)
            return sim

        yield build


@pytest.fixture
def make(make_sim: MakeSim) -> Iterator[Make]:
    """Make guests on vdpa_hwsim devices with the given parameters."""
    with ExitStack() as stack:

        def build(
            pairs: int = 1,
            wanted: Feature = SUPPORTED | CONTROL,
            without: BackendFeature = NOTHING,
            ring_size: int = 256,
            memory: int = lab.SMALL * 2,
            procedure: str | None = None,
            shadow: str | None = FULL,
            **parameters: object,
        ) -> HwGuest:
            guest = HwGuest(make_sim(pairs, **parameters), pairs, wanted, without, ring_size, memory, procedure, shadow)
            stack.callback(guest.close)
            return guest

        yield build
