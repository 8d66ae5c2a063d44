# SPDX-License-Identifier: MIT
"""Faults that drivers are known to have: a fail that is one of these is marked as such, with its source.

A row describes what the driver's source does. The rule is still broken; a fixed
driver passes it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownFault:
    """Driver ``module`` breaks ``rule``; ``source`` is the function that does, and where it was mended if it was."""

    module: str
    rule: str
    source: str


_SIM = "drivers/vdpa/vdpa_sim/vdpa_sim.c"
_SIM_NET = "drivers/vdpa/vdpa_sim/vdpa_sim_net.c"
_SIM_BLK = "drivers/vdpa/vdpa_sim/vdpa_sim_blk.c"

KNOWN: tuple[KnownFault, ...] = (
    KnownFault(
        "vdpa_sim",
        "suspend.driver_ok_again",
        f"{_SIM}:vdpasim_set_status recomputes running for every status with DRIVER_OK",
    ),
    KnownFault(
        "vdpa_sim",
        "suspend.old_kick",
        f"{_SIM}:vdpasim_do_reset leaves pending_kick set, which vdpasim_resume replays; fixed in Linux 7.3",
    ),
    KnownFault(
        "vdpa_sim",
        "control.each_its_answer",
        f"{_SIM_NET}:vdpasim_handle_cvq keeps the status of the command before for one that it does not know",
    ),
    KnownFault(
        "vdpa_sim",
        "control.one_byte",
        f"{_SIM_NET}:vdpasim_handle_cvq leaves its loop at a header that is too short, and never gives the chain back",
    ),
    KnownFault(
        "vdpa_sim",
        "control.mac_short",
        f"{_SIM_NET}:vdpasim_handle_ctrl_mac copies what there is into the configuration before it looks at the length",
    ),
    KnownFault(
        "vdpa_sim",
        "data.num_buffers",
        f"{_SIM_NET}:vdpasim_net_work hands the sender's header to the receiver as it is",
    ),
    KnownFault(
        "vp_vdpa",
        "identity.vring_size",
        "drivers/vdpa/virtio_pci/vp_vdpa.c:vp_vdpa_get_vq_num_max returns 256, whatever size the queues have",
    ),
    KnownFault(
        "eni_vdpa",
        "identity.version_1",
        "drivers/vdpa/alibaba/eni_vdpa.c:eni_vdpa_get_device_features passes on those of a legacy device",
    ),
    KnownFault(
        "vdpa_sim",
        "block.unknown_type",
        f"{_SIM_BLK}:vdpasim_blk_handle_req answers IOERR to a type that it does not know",
    ),
)
"""As the sources of Linux 6.12 have it; later fixes are noted."""


def known_fault(module: str | None, rule: str) -> KnownFault | None:
    """Return the known fault of a driver that breaks this rule, None without one."""
    return next((fault for fault in KNOWN if fault.module == module and fault.rule == rule), None)
