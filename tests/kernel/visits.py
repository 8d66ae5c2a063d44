"""A guest comes to a vdpa_hwsim device, has its frames looped back, and goes."""

from __future__ import annotations

import hwsim
from hw_guest import HwGuest
from hwsim import HwSim

from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.net.features import SUPPORTED, Feature


def use(sim: HwSim, pairs: int = 1, frames: int = 50) -> None:
    """A guest comes, has its frames looped back, and goes."""
    wanted = SUPPORTED | Feature.CTRL_VQ | Feature.MQ
    guest = HwGuest(sim, pairs, wanted, BackendFeature(0), ring_size=64, memory=8 << 20)
    try:
        guest.start()
        guest.use_all_pairs()
        guest.traffic.run()
        guest.receives(frames)
        guest.settle()
    except AssertionError as error:
        counted = {name: value for name, value in sim.read("stats").items() if value != "0"}
        raise AssertionError(f"{error}\n{sim.read('state')}\n{counted}") from error
    finally:
        guest.close()


def cycle(pairs: int = 2) -> None:
    """A device comes, is used, and goes."""
    sim = hwsim.add("mayfly", pairs)
    try:
        use(sim, pairs, 20)
    finally:
        hwsim.remove(sim.name)
