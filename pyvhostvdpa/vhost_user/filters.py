# SPDX-License-Identifier: MIT
"""Receive filters that QEMU keeps to itself: followed by its monitor, and set on the device.

A guest sets MAC address, MAC tables and receive modes by its control queue, which QEMU serves. A device that filters
in hardware has to know them. QEMU reports a change once (NIC_RX_FILTER_CHANGED) and is silent until it was asked for
the filter (query-rx-filter).
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import VhostVdpaError
from ..net.control import MAC_ADDR_SET, MAC_TABLE_SET, Class, ControlModel, Rx, command, mac_table

RETRY = 1.0
"""Seconds between attempts to connect to a monitor."""
ANSWER_SECONDS = 10.0
MAX_LINE = 1 << 20
_MAC_BYTES = 6
_EVENT = "NIC_RX_FILTER_CHANGED"


class MonitorGone(VhostVdpaError):
    """QEMU's monitor cannot be reached, closed the connection, or answers something else."""


@dataclass(frozen=True, slots=True)
class RxFilter:
    """What a guest wants to receive, by the fields of a control model."""

    mac: bytes
    unicast: tuple[bytes, ...]
    multicast: tuple[bytes, ...]
    unicast_overflow: bool
    multicast_overflow: bool
    modes: Mapping[Rx, bool]

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> RxFilter:
        """Return the filter of one NIC as query-rx-filter reports it; MonitorGone for anything else."""
        try:
            modes = {
                Rx.PROMISC: bool(answer["promiscuous"]),
                Rx.ALLMULTI: answer["multicast"] == "all",
                Rx.ALLUNI: answer["unicast"] == "all",
                Rx.NOMULTI: answer["multicast"] == "none",
                Rx.NOUNI: answer["unicast"] == "none",
                Rx.NOBCAST: not answer["broadcast-allowed"],
            }
            return cls(
                _address(answer["main-mac"]),
                tuple(_address(each) for each in answer["unicast-table"]),
                tuple(_address(each) for each in answer["multicast-table"]),
                bool(answer["unicast-overflow"]),
                bool(answer["multicast-overflow"]),
                modes,
            )
        except (KeyError, TypeError, ValueError) as e:
            raise MonitorGone(f"query-rx-filter was answered with {answer!r}: {e}") from None

    def commands(self, model: ControlModel) -> Iterator[bytes]:
        """Yield what brings a device from a model's state to this one: what widens first, what narrows last."""
        overflow = {Rx.PROMISC: self.unicast_overflow, Rx.ALLMULTI: self.multicast_overflow}
        wanted = {mode: on or overflow.get(mode, False) for mode, on in self.modes.items()}
        changed = [mode for mode in Rx if model.rx[mode] != wanted[mode]]
        widening = (Rx.PROMISC, Rx.ALLMULTI, Rx.ALLUNI)
        wider = [mode for mode in changed if (mode in widening) == wanted[mode]]
        yield from (command(Class.RX, mode, bytes([wanted[mode]])) for mode in wider)
        if model.mac != self.mac:
            yield command(Class.MAC, MAC_ADDR_SET, self.mac)
        if (tuple(model.unicast), tuple(model.multicast)) != (self.unicast, self.multicast):
            yield command(Class.MAC, MAC_TABLE_SET, mac_table(self.unicast, self.multicast))
        yield from (command(Class.RX, mode, bytes([wanted[mode]])) for mode in changed if mode not in wider)


def _address(text: str) -> bytes:
    address = bytes.fromhex(text.replace(":", ""))
    if len(address) != _MAC_BYTES:
        raise ValueError(f"{text!r} is not an address")
    return address


def choose(answers: Any, nic: str) -> Mapping[str, Any]:
    """Return the answer about one NIC: the only one, or that with a name; MonitorGone without such a NIC."""
    if not isinstance(answers, list) or not all(isinstance(each, dict) for each in answers):
        raise MonitorGone(f"query-rx-filter was answered with {answers!r}")
    found = [each for each in answers if not nic or each.get("name") == nic]
    if len(found) != 1:
        names = ", ".join(str(each.get("name")) for each in answers) or "none"
        raise MonitorGone(f"QEMU has the NICs {names}", hint="vhost-vdpa serve DEV --qmp PATH --qmp-nic NAME")
    answer: Mapping[str, Any] = found[0]
    return answer


class Monitor:
    """One connection to QEMU's monitor."""

    def __init__(self, path: str, cancel: int) -> None:
        self._cancel = cancel
        self._buffer = b""
        self._changed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
            self._socket.setblocking(False)
            self._read(ANSWER_SECONDS)
            self.ask("qmp_capabilities")
        except OSError as e:
            self._socket.close()
            raise MonitorGone(f"{path}: {e.strerror}") from e
        except BaseException:
            self._socket.close()
            raise

    def ask(self, name: str) -> Any:
        """Return the answer to a command without arguments."""
        self._socket.send(json.dumps({"execute": name}).encode() + b"\n", socket.MSG_NOSIGNAL)
        until = time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._read(max(0.0, until - time.monotonic()))
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise MonitorGone(f"{name}: {message['error']!r}")

    def wait_for_change(self) -> None:
        """Return once a filter has changed since it was asked for last."""
        while not self._changed:
            self._read(None)
        self._changed = False

    def _read(self, seconds: float | None) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.register(self._cancel, select.POLLIN)
            ready = dict(poll.poll(None if seconds is None else seconds * 1000))
            if self._cancel in ready or not ready:
                raise MonitorGone("nothing waits for it any more" if ready else "QEMU's monitor does not answer")
            data = self._socket.recv(1 << 16)
            if not data or len(self._buffer) > MAX_LINE:
                raise MonitorGone("QEMU closed its monitor")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as e:
            raise MonitorGone(f"QEMU's monitor does not speak JSON: {e}") from None
        if not isinstance(message, dict):
            raise MonitorGone(f"QEMU's monitor says {message!r}")
        self._changed |= message.get("event") == _EVENT
        return message

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class FilterFollower:
    """Follows the filter of a NIC in a thread; ``tell`` gets each, ``report`` words when it begins and ends."""

    def __init__(
        self, path: str, nic: str, tell: Callable[[RxFilter], None], report: Callable[[str, str], None]
    ) -> None:
        self._path, self._nic, self._tell, self._report = path, nic, tell, report
        self._cancel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rx-filter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        os.eventfd_write(self._cancel, 1)
        self._thread.join()
        os.close(self._cancel)

    def _run(self) -> None:
        last = ""
        while not self._stopped.is_set():
            try:
                self._follow()
            except (VhostVdpaError, OSError) as e:
                # each reason is reported once: the monitor may come up later
                if str(e) != last and not self._stopped.is_set():
                    last = str(e)
                    self._report("filter-unknown", last)
            self._stopped.wait(RETRY)

    def _follow(self) -> None:
        monitor = Monitor(self._path, self._cancel)
        try:
            while True:
                self._tell(RxFilter.parse(choose(monitor.ask("query-rx-filter"), self._nic)))
                monitor.wait_for_change()
        finally:
            monitor.close()
