# SPDX-License-Identifier: MIT
"""How a session and its device are, as data."""

from __future__ import annotations

from typing import Any

from ..base.uapi import name_list
from ..net.features import Feature
from .backend import Backend
from .features import OF_THE_PROTOCOL
from .session import FrontEndSession


def of_session(session: FrontEndSession) -> dict[str, Any]:
    """Return what a front-end has set up."""
    peer = session.channel.peer
    return {
        "pid": peer.pid,
        "uid": peer.uid,
        "protocol_features": [each.name for each in session.protocol],
        "status": session.status,
        "messages": session.messages,
        "refused": session.refused,
        "rings": [
            {"index": ring.index, "num": ring.num, "base": ring.base, "enabled": ring.enabled, "ready": ring.ready}
            for ring in session.rings
        ],
    }


def of_backend(backend: Backend) -> dict[str, Any]:
    """Return the state of a device and of what was asked of it."""
    device = backend.device
    features = Feature(backend.acknowledged & ~OF_THE_PROTOCOL)
    return {
        "device": device.path,
        "state": device.state.value,
        "procedure": device.procedure.name,
        "why_not_better": device.procedure.why_not_better or None,
        "features": name_list(features),
        "pairs": backend.pairs,
        "memory": {
            "regions": len(backend.memory.regions),
            "bytes": backend.memory.size,
            "early": backend.mapped.unclaimed,
            "discarded": backend.mapped.discarded,
        },
        "logging": backend.dirty_log.wanted,
        "log_inexact": backend.dirty_log.inexact or None,
        "failed": backend.failed or None,
        "migration": backend.migration,
    }
