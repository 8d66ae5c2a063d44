# SPDX-License-Identifier: MIT
"""``vhost-vdpa serve``."""

from __future__ import annotations

import argparse
import gc
import json
import os
import pwd
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from ..base.errors import VhostVdpaError
from ..device.net import VdpaNetDevice
from ..device.procedure import best
from ..host import mgmt
from ..memory.guest import GuestMemory
from ..migration.endpoint import Address, Listener, check_security
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import Feature
from ..trace.recorder import Trace
from ..vhost_user.backend import Backend
from ..vhost_user.doors import Door, listen
from ..vhost_user.features import protocol_decisions
from ..vhost_user.options import BackendOptions
from ..vhost_user.server import SCHEMA, STATUS_SUFFIX, Filters, Peering, Policy, Server
from . import tracing
from .failure import INTERRUPTED, PROGRAM, report
from .options import DEVICE, add_json, add_seconds
from .peer import add_tls_options, tls
from .table import table
from .units import SIZES, size

DESCRIPTION = """\
Put a virtual machine on a vDPA device: a vhost-user-net back-end whose device is DEV. QEMU (or another front-end)
connects to PATH. The device works on the guest's own rings and eventfds; no code of this program runs while traffic
flows. A live migration of the virtual machine switches the device to shadow virtqueues in place and logs dirty pages.
Memory that the guest's devices discard (balloon, free page reporting, virtio-mem) must not be used with it: see
'vhost-vdpa help serve'. DEV is reset."""
EPILOG = f"""\
{SIZES}

With several devices give PATH once per device, or once with {{}}, which stands for the device's name.
Sockets of systemd (LISTEN_FDS) are taken in the order of the devices if neither PATH nor N is given.

examples:
  vhost-vdpa serve vdpa0 --socket-path /run/net0.sock
  vhost-vdpa serve vdpa0 vdpa1 --socket-path '/run/{{}}.sock' --json
  vhost-vdpa serve vdpa0 --explain
  vhost-vdpa serve --status /run/net0.sock

exit status: 0 ended by SIGTERM, or the front-end of --fd left; 1 an error; 2 wrong usage; 130 interrupted"""

_FIRST_FD = 3
"""The first descriptor that systemd passes (sd_listen_fds(3))."""
_QUIET = frozenset({"message"})
_STATUS_MAX = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("devices", metavar="DEV", nargs="*", help=DEVICE)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", action="append", help="where front-ends connect, mode 0600")
    where.add_argument("--fd", metavar="N", action="append", type=int, help="an open socket, connected or listening")
    parser.add_argument("--status", metavar="PATH", help="print how the server of PATH is, as JSON, and end")
    parser.add_argument("--explain", action="store_true", help="print what a guest is offered, and why, and end")
    parser.add_argument("--print-capabilities", action="store_true", help="print what managers ask back-ends for")
    parser.add_argument(
        "--print-descriptor", action="store_true", help="print a JSON file for /usr/share/qemu/vhost-user"
    )
    parser.add_argument("--client", action="store_true", help="connect to PATH, where the front-end listens")
    parser.add_argument("--user", metavar="NAME", help="a user that may connect too, and will own the socket")
    parser.add_argument("--max-memory", metavar="SIZE", type=size, help="guest memory at most (default: no limit)")
    parser.add_argument(
        "--without",
        metavar="FEATURE",
        action="append",
        default=[],
        help="a virtio feature not to offer: CSUM, say",
    )
    parser.add_argument(
        "--indirect", action="store_true", help="offer indirect descriptors even if switches take longer"
    )
    parser.add_argument(
        "--front-end", choices=("qemu", "uml"), default="qemu", help="uml: User Mode Linux; qemu: every other one"
    )
    parser.add_argument("--allow-discard", action="store_true", help="serve guests whose memory may be discarded")
    parser.add_argument("--procedure", choices=best.NAMES, help="how the device is switched (default: as it can)")
    add_seconds(parser, "--control-deadline", DEFAULT_DEADLINE, "for a control command")
    parser.add_argument("--peer", metavar="ADDR", help="the server of the destination: unix:PATH or tcp:HOST:PORT")
    parser.add_argument("--peer-listen", metavar="ADDR", help="where servers of sources announce their guests")
    parser.add_argument("--qmp", metavar="PATH", help="a monitor of QEMU, to follow the guest's receive filters")
    parser.add_argument("--qmp-nic", metavar="NAME", default="", help="which NIC, if QEMU has several")
    add_tls_options(parser)
    add_json(parser, "print events as JSON, one object per line")
    tracing.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve, or print what was asked for."""
    if arguments.print_capabilities:
        print(json.dumps({"type": "net"}))
        return 0
    if arguments.print_descriptor:
        print(json.dumps(_descriptor(), indent=2))
        return 0
    if arguments.status:
        print(json.dumps(_ask_status(arguments.status), indent=2))
        return 0
    if not arguments.devices:
        arguments.parser.error("DEV is missing: which device shall be served?")
    with tracing.writing(arguments) as trace:
        if arguments.explain:
            return _explain(arguments, trace)
        return _serve(arguments, trace)


def _descriptor() -> dict[str, Any]:
    return {"description": "vDPA device behind vhost-user", "type": "net", "binary": _binary(), "tags": ["vdpa"]}


def _binary() -> str:
    return os.path.abspath(sys.argv[0]) if os.path.basename(sys.argv[0]) == PROGRAM else f"/usr/bin/{PROGRAM}"


def _ask_status(path: str) -> dict[str, Any]:
    """Return what a server says of itself; its socket is beside that of the front-end."""
    data = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(10)
            asking.connect(path + STATUS_SUFFIX)
            while len(data) < _STATUS_MAX and (piece := asking.recv(1 << 16)):
                data += piece
    except OSError as e:
        raise VhostVdpaError(
            f"no server answers at {path}{STATUS_SUFFIX}: {e.strerror or e}",
            hint="vhost-vdpa serve DEV --socket-path PATH starts a server",
        ) from e
    found: dict[str, Any] = json.loads(data)
    return found


# -- what is offered ---------------------------------------------------------------------


def _explain(arguments: argparse.Namespace, trace: Trace) -> int:
    found = []
    with ExitStack() as stack:
        for name in arguments.devices:
            backend = _open(stack, arguments, name, trace, lambda *_: None)
            found.append((name, backend))
        if arguments.json:
            print(json.dumps({"schema": SCHEMA, "devices": [_explained(*each) for each in found]}, indent=2))
        else:
            print("\n\n".join(_explanation(*each) for each in found))
    return 0


def _explained(name: str, backend: Backend) -> dict[str, Any]:
    procedure = backend.device.procedure
    return {
        "device": name,
        "pairs": backend.max_pairs,
        "mtu": backend.mtu,
        "procedure": procedure.to_dict(),
        "pins_memory": backend.mapped.pins,
        "features": [_decided(each) for each in backend.offer.decisions],
        "protocol_features": [_decided(each) for each in protocol_decisions(backend.options.has_config)],
    }


def _decided(decision: Any) -> dict[str, Any]:
    return {"name": decision.name, "bit": decision.bit, "offered": decision.offered, "why": decision.why}


def _explanation(name: str, backend: Backend) -> str:
    rows = [[each.name, str(each.bit), "yes" if each.offered else "no", each.why] for each in backend.offer.decisions]
    protocol = protocol_decisions(backend.options.has_config)
    spoken = [[each.name, str(each.bit), "yes" if each.offered else "no", each.why] for each in protocol]
    mtu = "unknown" if backend.mtu is None else backend.mtu
    pins = (
        "stays pinned: nothing may discard it" if backend.mapped.pins else "is not pinned: discarding it does no harm"
    )
    return "\n\n".join(
        [
            f"{name}: {backend.max_pairs} queue pairs, MTU {mtu}, switched by procedure {backend.device.procedure}\n"
            f"guest memory {pins}",
            table(["virtio feature", "bit", "offered", "why"], rows),
            table(["protocol feature", "bit", "offered", "why"], spoken),
        ]
    )


# -- serving ---------------------------------------------------------------------------------


def _open(stack: ExitStack, arguments: argparse.Namespace, name: str, trace: Trace, tell: Any) -> Backend:
    device = VdpaNetDevice(
        mgmt.chardev_of(name),
        trace,
        wanted=None,
        procedure=arguments.procedure,
        control_deadline=arguments.control_deadline,
    )
    # in this order: the session, the device, the memory that the device had
    memory = GuestMemory.empty()
    stack.callback(memory.close)
    stack.enter_context(device)
    options = BackendOptions(
        arguments.max_memory,
        _mask(arguments),
        arguments.indirect,
        control=bool(arguments.qmp),
        has_config=arguments.front_end != "uml",
    )
    return stack.enter_context(Backend(device, memory, trace, options, tell))


def _mask(arguments: argparse.Namespace) -> int:
    mask = ~0
    for name in arguments.without:
        try:
            mask &= ~int(Feature[name.upper()])
        except KeyError:
            arguments.parser.error(f"--without {name}: one of {', '.join(each.name or '' for each in Feature)}")
    return mask


def _serve(arguments: argparse.Namespace, trace: Trace) -> int:
    doors = _doors(arguments)
    policy = Policy(_uids(arguments), arguments.allow_discard)
    teller = _Teller(arguments.json)
    with ExitStack() as stack:
        servers = []
        for name, (door, path) in zip(arguments.devices, doors, strict=True):
            backend = _open(stack, arguments, name, trace, teller.of(name))
            opened = _opened(door, arguments)
            status = listen(path + STATUS_SUFFIX, arguments.user) if path else None
            server = Server(backend, opened, policy, status, _peering(arguments), _filters(arguments))
            servers.append(stack.enter_context(server))
            teller.of(name)("serving", {"path": path or "socket", "offered": f"{backend.offer.features:#x}"})
        return _run(servers)


def _peering(arguments: argparse.Namespace) -> Peering:
    if len(arguments.devices) > 1 and (arguments.peer or arguments.peer_listen):
        arguments.parser.error("--peer and --peer-listen are for one device: serve each device by itself")
    secured = tls(arguments)
    to = Address.parse(arguments.peer) if arguments.peer else None
    at = Address.parse(arguments.peer_listen) if arguments.peer_listen else None
    for address in (to, at):
        if address is not None:
            check_security(address, secured, arguments.insecure_plain)
    return Peering(to, secured, None if at is None else Listener(at, secured))


def _filters(arguments: argparse.Namespace) -> Filters:
    if len(arguments.devices) > 1 and arguments.qmp:
        arguments.parser.error("--qmp is for one device: serve each device by itself")
    return Filters(arguments.qmp or "", arguments.qmp_nic)


def _opened(door: Door | str, arguments: argparse.Namespace) -> Door:
    """Return a door that is open; a path is listened at only once its device is."""
    if isinstance(door, Door):
        return door
    return Door(connect_to=door) if arguments.client else Door(listening=listen(door, arguments.user))


def _doors(arguments: argparse.Namespace) -> list[tuple[Door | str, str]]:
    """Return where each device's front-end comes from, and the path of its socket ("" if it has none)."""
    count = len(arguments.devices)
    if arguments.socket_path:
        paths = list(arguments.socket_path)
        if len(paths) == 1 and "{}" in paths[0]:
            names = [os.path.basename(name) for name in arguments.devices]
            paths = [paths[0].replace("{}", name) for name in names]
        if len(paths) != count:
            arguments.parser.error(f"{len(paths)} of --socket-path for {count} devices (PATH with {{}} is for all)")
        return [(path, path) for path in paths]
    if arguments.client:
        arguments.parser.error("--client needs --socket-path")
    fds = arguments.fd or _systemd_fds()
    if not fds:
        arguments.parser.error("--socket-path is missing: where do front-ends connect?")
    if len(fds) != count:
        arguments.parser.error(f"{len(fds)} sockets for {count} devices")
    return [_door_of(fd) for fd in fds]


def _door_of(fd: int) -> tuple[Door, str]:
    try:
        given = socket.socket(fileno=fd)
        listening = given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as e:
        raise VhostVdpaError(
            f"descriptor {fd} is not a socket: {e.strerror}", hint="vhost-vdpa serve DEV --fd N"
        ) from e
    os.set_inheritable(fd, False)
    if not listening:
        return Door(connected=given), ""
    given.setblocking(False)
    path = given.getsockname()
    return Door(listening=given, keep_path=True), path if isinstance(path, str) and path.startswith("/") else ""


def _systemd_fds() -> list[int]:
    """Return the sockets that systemd has opened for this process (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "0")
    return list(range(_FIRST_FD, _FIRST_FD + int(count))) if count.isdecimal() else []


def _uids(arguments: argparse.Namespace) -> frozenset[int]:
    if arguments.user is None:
        return frozenset()
    try:
        return frozenset({pwd.getpwnam(arguments.user).pw_uid})
    except KeyError:
        raise VhostVdpaError(f"there is no user {arguments.user}", hint="getent passwd lists them") from None


def _run(servers: Sequence[Server]) -> int:
    """Run every server until it ends or a signal comes; the exit status."""
    got: list[int] = []
    failed: list[BaseException] = []

    def stop(number: int, _: FrameType | None) -> None:
        got.append(number)
        for server in servers:
            server.stop()

    def serve(server: Server) -> None:
        try:
            server.run()
        except BaseException as e:
            failed.append(e)
            stop(0, None)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    threads = [threading.Thread(target=serve, args=(server,), name="serve") for server in servers[1:]]
    # a collection looks at every object of all modules: for milliseconds in which a guest may be waiting
    gc.collect()
    gc.freeze()
    try:
        for thread in threads:
            thread.start()
        _notify_systemd("READY=1")
        serve(servers[0])
        for thread in threads:
            thread.join()
    finally:
        gc.unfreeze()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise failed[0]
    return INTERRUPTED if got[:1] == [signal.SIGINT] else 0


def _notify_systemd(state: str) -> None:
    """Notify the service manager, if any (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling, suppress(OSError):
        telling.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


class _Teller:
    """Prints events: as JSON lines on standard output, or as lines for people on standard error."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._lock = threading.Lock()

    def of(self, device: str) -> Any:
        """Return what reports the events of one device."""

        repeats = _Repeats()

        def tell(event: str, fields: Mapping[str, Any]) -> None:
            if event in _QUIET:
                return
            line = {"time": datetime.now(UTC).isoformat(), "device": device, "event": event, **fields}
            with self._lock:
                for each in repeats.pass_on(line):
                    self._print(each)

        return tell

    def _print(self, line: Mapping[str, Any]) -> None:
        if self._json:
            print(json.dumps(line), flush=True)
            return
        head, *words = [f"{name} {value}" for name, value in line.items() if value not in (None, "")][2:]
        event = head.partition(" ")[2]
        report(f"{line['device']}: {event}" + (f": {', '.join(words)}" if words else ""))


class _Repeats:
    """Withholds what a front-end causes that connects again and again to a device that cannot be started.

    QEMU with reconnect-ms does that each second, and a session is four lines. Of sessions that fail in the same way
    the first is told; of the others how many there were, before whatever comes next.
    """

    def __init__(self) -> None:
        self._before: list[Mapping[str, Any]] = []
        """What the last session was, if it failed."""
        self._session: list[Mapping[str, Any]] = []
        self._held: list[Mapping[str, Any]] = []
        self._times = 0

    def pass_on(self, line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return what is to be told now."""
        if line["event"] == "connected":
            self._session = []
        place = len(self._session)
        self._session.append(line)
        if place >= len(self._before) or not _same(line, self._before[place]):
            self._before = []
        else:
            self._held.append(line)
        if line["event"] == "disconnected":
            if self._held and self._before:
                self._held = []
                self._times += 1
                return []
            if any(each["event"] == "device-failed" for each in self._session):
                self._before = self._session
        return [] if self._held and self._before else self._release(line)

    def _release(self, line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        held, self._held = self._held, []
        times, self._times = self._times, 0
        again = {"time": line["time"], "device": line["device"], "event": "failed-again", "times": times}
        return [*([again] if times else []), *held, line]


def _same(line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(line.get(name) == other.get(name) for name in {*line, *other} - {"time"})
