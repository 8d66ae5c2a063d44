# SPDX-License-Identifier: MIT
"""One connection of a front-end: what each message means in the state that the session is in.

The orders of messages are those of QEMU, Cloud Hypervisor, User Mode Linux and DPDK (SET_VRING_ENABLE and
SET_VRING_CALL before everything else, dirty log after the rings, no STATUS, only SET_VRING_ENABLE 0 as a stop). A
message that cannot be carried out is answered with an error if the front-end asked for an answer. If it did not, it
would continue as if it had been done: then the connection ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from ..base.closing import Closing
from ..base.errors import VhostVdpaError
from ..base.eventfds import close_all
from ..memory.mapped import cannot_shrink
from .backend import Backend
from .channel import Descriptors, MessageChannel
from .coming import MAX_RING
from .features import LOG_ALL, PROTOCOL_FEATURES, protocol_offer
from .memory import MAX_SLOTS
from .messages import (
    NO_FD,
    SHAPES,
    ConfigSpace,
    LogArea,
    MemoryTable,
    Message,
    MessageRefused,
    Number,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Request,
    StateTransfer,
    TableRegion,
    VringAddress,
    VringFd,
    VringNumber,
    decode,
    reply_config,
    reply_log,
    reply_number,
    reply_state,
)
from .piped import raise_if_possible
from .rings import Ring, enabled_pairs, queues_of
from .state import StateTransferThread, load_state, save_state

DRIVER_OK = 4
_RING_LOGGED = 1
"""VHOST_VRING_F_LOG."""
_FAILED = 1

_P = TypeVar("_P")


class FrontEndSession(Closing):
    """What a front-end has said so far, and what follows from its next message. It owns the channel.

    Raises :class:`~pyvhostvdpa.VhostVdpaError` if the device is not ready for another front-end.
    """

    def __init__(self, backend: Backend, channel: MessageChannel) -> None:
        backend.begin_session()
        self.backend = backend
        self.channel = channel
        self.status = 0
        self.rings = [Ring(index) for index in range(2 * backend.max_pairs)]
        self._offer = protocol_offer(backend.options.has_config)
        self._requests = -1
        """Where requests to the front-end would go."""
        self.messages = 0
        self.refused = 0
        self._acknowledged: int | None = None
        self._transfer: StateTransferThread | None = None
        self._looked_at: set[tuple[int, int]] = set()
        """Files of guest memory, by device and inode."""
        self._handlers: dict[Request, Callable[[Message], bytes | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._nothing,
            Request.RESET_OWNER: self._nothing,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_LOG_BASE: self._set_log_base,
            Request.SET_LOG_FD: self._nothing,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.NET_SET_MTU: self._net_set_mtu,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.GET_CONFIG: self._get_config,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: self._get_status,
            Request.SET_DEVICE_STATE_FD: self._set_device_state_fd,
            Request.CHECK_DEVICE_STATE: self._check_device_state,
        }
        self._speak(ProtocolFeature(0))

    def _speak(self, features: ProtocolFeature) -> None:
        """Use these protocol features. What each message asks of them is kept: to look into flags takes longer."""
        self.protocol = features
        self._acknowledges = ProtocolFeature.REPLY_ACK in features
        self._has_status = ProtocolFeature.STATUS in features
        self._guest_addresses = ProtocolFeature.GPA_ADDRESSES in features
        self._allowed = {
            request: handler for request, handler in self._handlers.items() if not SHAPES[request].needs & ~features
        }

    # -- one message -------------------------------------------------------------------

    def serve_one(self) -> None:
        """Receive one message, carry it out and answer it.

        Raises :class:`~pyvhostvdpa.vhost_user.channel.FrontEndGone`, and :class:`ProtocolError` for errors that end the
        connection.
        """
        header, payload, fds = self.channel.receive()
        begin = time.monotonic_ns()
        self.messages += 1
        try:
            message = decode(header, payload, tuple(fds))
        except ProtocolError as e:
            close_all(fds)
            self._answer_refused(header.request, header.need_reply, e)
            return
        answer = self._carry_out(message)
        if answer is not None:
            self.channel.send(answer)
        took = time.monotonic_ns() - begin
        self.backend.report("message", {"request": message.request.name, "ms": round(took / 1e6, 3)})

    def _carry_out(self, message: Message) -> bytes | None:
        """Return the answer to a message, None for none. Descriptors that the handler did not take are closed."""
        kept = Descriptors(message.fds)
        self._fds = kept
        try:
            handler = self._allowed.get(message.request)
            if handler is None:
                raise self._not_allowed(message)
            answer = handler(message)
        except (VhostVdpaError, ValueError, OSError) as e:
            return self._refusal(message, e)
        finally:
            kept.close()
        if answer is None and message.need_reply and self._acknowledges:
            return reply_number(message.request, 0)
        return answer

    def _not_allowed(self, message: Message) -> ProtocolError:
        needed = SHAPES[message.request].needs
        if needed & ~self.protocol:
            return ProtocolError(f"{message.request.name} needs {needed.name}, which was not negotiated")
        return ProtocolError(f"{message.request.name} is not served")

    def _refusal(self, message: Message, error: Exception) -> bytes | None:
        """Return the answer that refuses; ProtocolError where the protocol has no answer."""
        self._note_refused(message.request.name, error)
        if message.request is Request.SET_DEVICE_STATE_FD:
            return reply_number(message.request, _FAILED | NO_FD)
        if message.request is Request.SET_LOG_BASE and not self.backend.dirty_log.wanted:
            # QEMU takes any reply for a yes; SET_FEATURES with LOG_ALL is refused then, which it does look at
            return reply_number(message.request, _FAILED)
        if message.has_own_reply:
            raise ProtocolError(f"{message.request.name}: {error}") from error
        if not (message.need_reply and self._acknowledges):
            raise ProtocolError(f"{message.request.name}: {error}; the front-end asked for no answer") from error
        return reply_number(message.request, _FAILED)

    def _answer_refused(self, request: int, need_reply: bool, error: ProtocolError) -> None:
        """Answer a message that could not even be decoded, if an error is an answer to it."""
        shape = SHAPES.get(Request(request)) if request in Request.__members__.values() else None
        self._note_refused(str(request), error)
        if not need_reply or not self._acknowledges or shape is None or shape.replies:
            raise error
        self.channel.send(reply_number(request, _FAILED))

    def _note_refused(self, name: str, error: Exception) -> None:
        self.refused += 1
        hint = error.hint if isinstance(error, VhostVdpaError) else ""
        self.backend.report("refused", {"request": name, "error": str(error), **({"hint": hint} if hint else {})})

    def _nothing(self, message: Message) -> None:
        """Accept a message that has no effect here."""

    # -- negotiation -------------------------------------------------------------------

    def _get_features(self, message: Message) -> bytes:
        return reply_number(message.request, self.backend.offer.features)

    def _set_features(self, message: Message) -> None:
        features = _as(Number, message.payload).value
        self.backend.acknowledge(features & ~LOG_ALL)
        if self._acknowledged is None and not features & PROTOCOL_FEATURES:
            # without protocol features rings are not enabled by a message
            for ring in self.rings:
                ring.enabled = True
        self._acknowledged = features
        self.backend.set_logging(bool(features & LOG_ALL))

    def _get_protocol_features(self, message: Message) -> bytes:
        return reply_number(message.request, int(self._offer))

    def _set_protocol_features(self, message: Message) -> None:
        features = _as(Number, message.payload).value
        if beyond := features & ~int(self._offer):
            raise MessageRefused(f"protocol features that were not offered: {beyond:#x}")
        self._speak(ProtocolFeature(features))

    def _get_queue_num(self, message: Message) -> bytes:
        return reply_number(message.request, self.backend.max_pairs)

    def _get_max_mem_slots(self, message: Message) -> bytes:
        return reply_number(message.request, MAX_SLOTS)

    def _net_set_mtu(self, message: Message) -> None:
        wanted, have = _as(Number, message.payload).value, self.backend.mtu
        if have is not None and wanted > have:
            raise MessageRefused(
                f"the front-end's MTU is {wanted}, that of {self.backend.device.path} is {have}",
                hint=f"virtio-net-pci,host_mtu={have}",
            )

    def _set_backend_req_fd(self, message: Message) -> None:
        # nothing is asked, but a front-end takes an end of its channel for that of the back-end
        old, self._requests = self._requests, self._fds.pop()
        close_all([old])

    def _get_config(self, message: Message) -> bytes:
        wanted = _as(ConfigSpace, message.payload)
        found = self.backend.device.config()[wanted.offset : wanted.offset + len(wanted.data)]
        whole = len(found) == len(wanted.data)
        return reply_config(message.request, ConfigSpace(wanted.offset, 0, found if whole else b""))

    def _get_status(self, message: Message) -> bytes:
        return reply_number(message.request, self.status)

    # -- memory ------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        table = _as(MemoryTable, message.payload).regions
        change = self.backend.memory.check_table(table, message.fds)
        self.backend.mapped.change(change.gone, [(region, message.fds[number]) for number, region in change.added])
        self._tell_unsealed()

    def _add_mem_reg(self, message: Message) -> None:
        memory = self.backend.memory
        region = memory.check_added(_as(TableRegion, message.payload), message.fds[0])
        if memory.has(region):
            memory.repeat(region)
        else:
            self.backend.mapped.change((), [(region, message.fds[0])])
            self._tell_unsealed()

    def _tell_unsealed(self) -> None:
        """Say once of each file that the front-end could make it shorter."""
        for key, fd in self.backend.memory.files.items():
            if key not in self._looked_at:
                self._looked_at.add(key)
                if not cannot_shrink(fd):
                    why = "if its owner makes the file shorter, the guest has lost what was behind the new end"
                    self.backend.report("memory-not-sealed", {"file": os.readlink(f"/proc/self/fd/{fd}"), "why": why})

    def _rem_mem_reg(self, message: Message) -> None:
        region = self.backend.memory.find(_as(TableRegion, message.payload))
        if self.backend.memory.release(region):
            self.backend.mapped.change([region], ())

    # -- rings -------------------------------------------------------------------------

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise MessageRefused(f"ring {index}: there are {len(self.rings)}")
        return self.rings[index]

    def _set_vring_num(self, message: Message) -> None:
        state = _as(VringNumber, message.payload)
        ring = self._stopped_ring(state.index)
        most = self.backend.device.ring_sizes[state.index]
        if not 0 < state.num <= min(most, MAX_RING) or state.num & (state.num - 1):
            raise MessageRefused(
                f"ring {state.index} of {state.num} entries; {self.backend.device.path} has powers of two up to {most}",
                hint=f"virtio-net-pci,rx_queue_size={most},tx_queue_size={most}",
            )
        ring.num = state.num

    def _set_vring_base(self, message: Message) -> None:
        state = _as(VringNumber, message.payload)
        ring = self._stopped_ring(state.index)
        if state.num > 0xFFFF:
            raise MessageRefused(f"ring {state.index}: the base {state.num:#x} is not that of a split ring")
        ring.base = state.num

    def _stopped_ring(self, index: int) -> Ring:
        ring = self._ring(index)
        if self.backend.running and ring.kicked:
            raise MessageRefused(f"ring {index} runs")
        return ring

    def _set_vring_addr(self, message: Message) -> None:
        address = _as(VringAddress, message.payload)
        ring = self._ring(address.index)
        if address.flags & ~_RING_LOGGED:
            raise MessageRefused(f"ring {address.index}: unknown flags {address.flags:#x}")
        _, _, used = ring.locate(address, self.backend.memory, self._guest_addresses)
        if address.flags & _RING_LOGGED and address.log != used:
            raise MessageRefused(f"ring {address.index}: is logged at {address.log:#x}, its used ring is at {used:#x}")
        if self.backend.running and ring.kicked and not _same_place(ring.address, address):
            raise MessageRefused(f"ring {address.index} runs, it cannot be moved")
        ring.address = address

    def _eventfd(self) -> int:
        """Take ownership of an eventfd. A thread that serves a ring must not block on one that is full, or empty."""
        # it stays the message's until it is known to be usable: O_PATH has no flags
        os.set_blocking(self._fds.first, False)
        return self._fds.pop()

    def _set_vring_kick(self, message: Message) -> None:
        ring = self._ring(_as(VringFd, message.payload).index)
        if not message.fds:
            raise MessageRefused(f"ring {ring.index}: without a kick eventfd it would have to be polled")
        running = self.backend.running and ring.kicked
        ring.replace("kick", self._eventfd())
        ring.kicked = True
        if running:
            self.backend.set_eventfds(ring.index, kick=ring.kick)
            ring.discard()
        else:
            self._maybe_start()

    def _set_vring_call(self, message: Message) -> None:
        ring = self._ring(_as(VringFd, message.payload).index)
        passed_on = ring.piped is not None
        call = self._eventfd() if message.fds else -1
        if self.backend.options.has_config:
            ring.replace("call", call)
        else:
            ring.replace_call(call)
        if self.backend.running and ring.kicked:
            self.backend.set_eventfds(ring.index, call=ring.call)
            ring.discard()
            if passed_on and ring.call >= 0:
                # what the device raised in between was passed on to nobody
                raise_if_possible(ring.call)

    def _set_vring_err(self, message: Message) -> None:
        ring = self._ring(_as(VringFd, message.payload).index)
        ring.replace("error", self._fds.pop() if message.fds else -1)

    def _set_vring_enable(self, message: Message) -> None:
        state = _as(VringNumber, message.payload)
        if state.num > 1:
            raise MessageRefused(f"ring {state.index}: enable is {state.num}")
        self._ring(state.index).enabled = bool(state.num)
        pairs = enabled_pairs(self.rings)
        if not self.backend.running:
            self._maybe_start()
        elif pairs:
            self.backend.set_pairs(pairs)
        elif not any(ring.enabled for ring in self.rings):
            if self.backend.options.has_config:
                # how some front-ends pause
                self._stop()
            else:
                # how User Mode Linux resets: its driver has taken the buffers back, and what is in flight is not known
                self._reset()

    def _get_vring_base(self, message: Message) -> bytes:
        ring = self._ring(_as(VringNumber, message.payload).index)
        if self.backend.running:
            # the first one stops all: no ring of a guest that is stopped may be written
            self._stop()
        elif self.backend.failed and ring.kicked:
            # the device was lost while the front-end took the ring for running: its base is not that of the start
            self._keep(self.backend.bases())
        ring.stop()
        return reply_state(message.request, VringNumber(ring.index, ring.base or 0))

    # -- start and stop ------------------------------------------------------------------

    def _set_status(self, message: Message) -> None:
        status = _as(Number, message.payload).value
        if status > 0xFF:
            raise MessageRefused(f"status {status:#x}")
        self.status = status
        if status & DRIVER_OK:
            if not self.backend.running and any(ring.ready for ring in self.rings):
                self._start()
        elif self.backend.running:
            self._stop()

    def _maybe_start(self) -> None:
        """Start if every ring that is enabled is ready; with STATUS only behind DRIVER_OK."""
        enabled = [ring for ring in self.rings if ring.enabled]
        waits = self._has_status and not self.status & DRIVER_OK
        if waits or not enabled_pairs(self.rings) or not all(ring.ready for ring in enabled):
            return
        if self._acknowledged is None:
            return
        if self.backend.running:
            # another pair came: without STATUS it was unknown that the first was not all
            if sum(ring.ready for ring in self.rings) == len(self.backend.queues):
                return
            self._stop()
        self._start()

    def _start(self) -> None:
        if self._acknowledged is None:
            raise MessageRefused("the rings are started before features were set")
        pairs = enabled_pairs(self.rings)
        if not pairs:
            # it is started when a pair is enabled
            return
        queues = queues_of(self.rings, self.backend.memory, self._guest_addresses)
        bases = {ring.index: ring.base for ring in self.rings if ring.ready and ring.base is not None}
        self.backend.start(queues, bases, min(pairs, len(queues) // 2))
        for ring in self.rings:
            ring.discard()

    def _stop(self) -> None:
        self._keep(self.backend.stop())

    def _keep(self, bases: Mapping[int, int]) -> None:
        for index, base in bases.items():
            if index < len(self.rings):
                self.rings[index].base = base

    def _reset_device(self, message: Message) -> None:
        self._reset()

    def _reset(self) -> None:
        self.backend.reset()
        self.status = 0
        for ring in self.rings:
            ring.enabled = False
            ring.stop()

    # -- migration -----------------------------------------------------------------------

    def _set_log_base(self, message: Message) -> bytes:
        area = _as(LogArea, message.payload)
        self.backend.set_log(area, message.fds[0])
        return reply_log(message.request, area)

    def _set_device_state_fd(self, message: Message) -> bytes:
        transfer = _as(StateTransfer, message.payload)
        if self.backend.running:
            raise MessageRefused("the device's state is moved while it runs")
        if self._transfer is not None and self._transfer.running:
            raise MessageRefused("another transfer of the device's state is under way")
        self._drop_transfer()
        data = None if transfer.load else save_state(self.backend, self.rings)
        self._transfer = StateTransferThread(self._fds.pop(), data)
        return reply_number(message.request, NO_FD)

    def _check_device_state(self, message: Message) -> bytes:
        transfer, self._transfer = self._transfer, None
        try:
            if transfer is None:
                raise MessageRefused("no state was transferred")
            received = transfer.result()
            if received is not None:
                load_state(self.backend, received)
        except (VhostVdpaError, ValueError, OSError) as e:
            self._note_refused(message.request.name, e)
            return reply_number(message.request, _FAILED)
        return reply_number(message.request, 0)

    def _drop_transfer(self) -> None:
        """End a transfer whose result was not asked for."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.abandon()

    # -- around it -----------------------------------------------------------------------

    def raise_error(self) -> None:
        """Raise the error eventfds: the device has failed."""
        for ring in self.rings:
            if ring.error >= 0:
                raise_if_possible(ring.error)

    def close(self) -> None:
        """End the session: the device is reset before its eventfds are closed."""
        self.backend.end_session()
        self._drop_transfer()
        for ring in self.rings:
            ring.close()
        requests, self._requests = self._requests, -1
        close_all([requests])
        self.channel.close()


def _as(kind: type[_P], payload: Payload) -> _P:
    """Return a payload as what the decoder of its request makes."""
    assert isinstance(payload, kind)
    return payload


def _same_place(one: VringAddress | None, other: VringAddress) -> bool:
    return one is not None and (one.desc, one.avail, one.used) == (other.desc, other.avail, other.used)
