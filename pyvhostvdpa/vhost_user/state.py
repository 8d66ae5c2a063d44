# SPDX-License-Identifier: MIT
"""The back-end's own state in a migration: a small JSON through a pipe that the front-end opens.

What the guest sees is in its memory and in the front-end. Left is what the device was set to: queue pairs, addresses
and filters, and where its queues stand, which is compared with the rings.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..base.errors import VhostVdpaError
from ..base.eventfds import close_all
from ..net.control import MAX_VLAN, ControlModel, Rx
from .backend import Backend
from .messages import MessageRefused
from .piped import streams
from .rings import Ring

SCHEMA = "pyvhostvdpa/device-state/1"
MAX_STATE = 1 << 20
"""Bytes at most of a state that is loaded."""
DEADLINE = 10.0
"""Seconds that a transfer may take."""
_GRACE = 1.0
_MAC_BYTES = 6


def save_state(backend: Backend, rings: Sequence[Ring]) -> bytes:
    """Return the state of a stopped device."""
    model = backend.control_model
    state = {
        "schema": SCHEMA,
        "features": backend.acknowledged,
        "mtu": backend.mtu,
        "rings": [{"index": ring.index, "base": ring.base} for ring in rings if ring.address is not None],
        "pairs": backend.pairs,
        "control": None if model is None else control_to_dict(model),
    }
    return json.dumps(state, separators=(",", ":")).encode()


def control_to_dict(model: ControlModel) -> dict[str, Any]:
    """Return what a control queue has set, for JSON."""
    return {
        "mac": None if model.mac is None else model.mac.hex(),
        "unicast": [each.hex() for each in model.unicast],
        "multicast": [each.hex() for each in model.multicast],
        "overflow": [model.unicast_overflow, model.multicast_overflow],
        "rx": {mode.name: model.rx[mode] for mode in Rx},
        "vlans": sorted(model.vlans),
    }


def load_state(backend: Backend, data: bytes) -> None:
    """Take a state over; :class:`MessageRefused` for anything but what :func:`save_state` writes.

    It is checked in full first.
    """
    state = _parsed(data)
    mtu, have = state["mtu"], backend.mtu
    if mtu is not None and have is not None and mtu != have:
        raise MessageRefused(f"the guest's device had an MTU of {mtu}, {backend.device.path} has {have}")
    if state["pairs"] > backend.max_pairs:
        raise MessageRefused(
            f"the guest uses {state['pairs']} queue pairs, {backend.device.path} has {backend.max_pairs}"
        )
    backend.adopt(
        state["control"], {each["index"]: each["base"] for each in state["rings"] if each["base"] is not None}
    )


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise MessageRefused(f"the device's state is not JSON: {e}") from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise MessageRefused("the device's state is not from this kind of back-end", hint="use serve on both sides")
    for name, low, high in (("features", 0, 1 << 64), ("pairs", 0, 1 << 15)):
        check_integer(state, name, low, high)
    if state.get("mtu") is not None:
        check_integer(state, "mtu", 0, 1 << 16)
    state.setdefault("mtu", None)
    rings = state.get("rings")
    if not isinstance(rings, list) or not all(isinstance(each, dict) for each in rings):
        raise MessageRefused("the device's state has no list of rings")
    for each in rings:
        check_integer(each, "index", 0, 1 << 16)
        if each.setdefault("base", None) is not None:
            check_integer(each, "base", 0, 1 << 16)
    control = state.get("control")
    state["control"] = None if control is None else control_from_dict(control)
    return state


def check_integer(state: Mapping[str, Any], name: str, low: int, high: int) -> None:
    """Raise :class:`MessageRefused` unless a field is a number from ``low`` to below ``high``."""
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        raise MessageRefused(f"the device's state has {name} = {value!r}")


def control_from_dict(control: Any) -> dict[str, Any]:
    """Return the fields of a control model; :class:`MessageRefused` if they are not what one has."""
    try:
        mac = None if control["mac"] is None else _address(control["mac"])
        unicast, multicast = ([_address(each) for each in control[name]] for name in ("unicast", "multicast"))
        overflow = [bool(each) for each in control["overflow"]]
        rx = {Rx[name]: bool(on) for name, on in control["rx"].items()}
        vlans = {each for each in control["vlans"] if isinstance(each, int)}
        if len(vlans) != len(control["vlans"]):
            raise ValueError("VLANs that are not numbers, or twice the same")
        if len(overflow) != 2 or set(rx) != set(Rx) or not all(0 <= each < MAX_VLAN for each in vlans):
            raise ValueError("values out of range")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise MessageRefused(f"the device's state has a malformed control state: {e!r}") from None
    return {
        "mac": mac,
        "unicast": unicast,
        "multicast": multicast,
        "unicast_overflow": overflow[0],
        "multicast_overflow": overflow[1],
        "rx": rx,
        "vlans": vlans,
    }


def _address(text: str) -> bytes:
    address = bytes.fromhex(text)
    if len(address) != _MAC_BYTES:
        raise ValueError(f"{text!r} is not an address")
    return address


class StateTransferThread:
    """Writes a state into a pipe, or reads one to its end, while the session continues. It owns the descriptor."""

    def __init__(self, fd: int, data: bytes | None, deadline: float = DEADLINE) -> None:
        if not streams(fd):
            os.close(fd)
            # reading a file of a file system in user space takes as long as that likes
            raise MessageRefused("the device's state is moved through something else than a pipe or a socket")
        self._fd = fd
        self._data = data
        self._until = time.monotonic() + deadline
        self._received: bytes | None = None
        self._error: Exception | None = None
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="device-state", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def result(self) -> bytes | None:
        """Wait for the end; what was received, None after a save. Raises what went wrong."""
        self._join()
        self._release()
        if self._error is not None:
            raise self._error
        return self._received

    def abandon(self) -> None:
        """End it wherever it is."""
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)
        with suppress(MessageRefused):
            self._join()
            self._release()

    def _join(self) -> None:
        """Wait for the thread, but not for ever: another process with the pipe can take the data."""
        self._thread.join(max(0.0, self._until - time.monotonic()) + _GRACE)
        if self._thread.is_alive():
            raise MessageRefused("the front-end keeps the transfer of the device's state from ending")

    def _release(self) -> None:
        stop, self._stop = self._stop, -1
        close_all([stop])

    def _run(self) -> None:
        try:
            # the other side may share the file: its mode must stay, so every access is waited for
            if self._data is None:
                self._received = self._read()
            else:
                self._write(self._data)
        except (OSError, VhostVdpaError) as e:
            self._error = e
        finally:
            os.close(self._fd)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._fd, event)
        poll.register(self._stop, select.POLLIN)
        left = self._until - time.monotonic()
        ready = dict(poll.poll(max(0, int(left * 1000)) + 1)) if left > 0 else {}
        if self._stop in ready or self._fd not in ready:
            raise MessageRefused("the front-end did not move the device's state in time")

    def _read(self) -> bytes:
        data = b""
        while True:
            self._wait(select.POLLIN)
            piece = os.read(self._fd, 1 << 16)
            if not piece:
                return data
            data += piece
            if len(data) > MAX_STATE:
                raise MessageRefused(f"the device's state is longer than {MAX_STATE} bytes")

    def _write(self, data: bytes) -> None:
        while data:
            self._wait(select.POLLOUT)
            # a pipe that is writable takes this much without blocking (pipe(7), PIPE_BUF)
            data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
