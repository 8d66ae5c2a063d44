# SPDX-License-Identifier: MIT
"""Frames come back as they were sent: all sizes, patterns, orders, and nothing beside them is touched."""

from __future__ import annotations

from collections.abc import Iterable

from ....base.errors import KernelError
from ....base.uapi import BackendFeature
from ....net.features import Feature
from ..bench import PATIENCE_S, Bench
from ..rule import NET, Broken, CannotTell, Group, NotOffered, demand
from ..work import BUFFER, ETHERTYPE, FRAME, HEADER, NetWork, running, running_net

GROUP = Group("data", "data integrity")
rule = GROUP.rule
_NET = "virtio 1.3, 5.1.6"


def _looping(bench: Bench) -> NetWork:
    job = running_net(bench)
    job.works()
    job.needs_loop()
    return job


def _each(job: NetWork, frames: Iterable[bytes], what: str) -> int:
    count = 0
    for frame in frames:
        job.post()
        job.send(frame)
        job.kick()
        job.finish(1, f"{what}, frame of {len(frame)} bytes")
        count += 1
    return count


@rule("sizes", "Frames of every size up to the MTU come back", _NET, NET, 30)
def sizes(bench: Bench) -> str:
    job = _looping(bench)
    most = 1514
    count = _each(job, (job.frame(size) for size in [*range(60, 130), *range(130, most, 61), most]), "every size")
    return f"{count} frames of 60 to {most} bytes"


@rule("smallest", "A frame of no more than its header comes back", _NET, NET)
def smallest(bench: Bench) -> str:
    job = _looping(bench)
    _each(job, [job.frame(14), job.frame(15)], "smallest")
    return "14 and 15 bytes"


@rule("patterns", "Bytes of every value come back", _NET, NET)
def patterns(bench: Bench) -> str:
    job = _looping(bench)
    head = job.frame(14)
    bodies = (bytes(500), b"\xff" * 500, b"\xaa\x55" * 250, bytes(range(256)) * 2, bytes(reversed(range(256))) * 2)
    return f"{_each(job, (head + body for body in bodies), 'patterns')} patterns"


@rule("in_order", "Frames come back in the order in which they were sent", f"{_NET}; 2.7.13", NET)
def in_order(bench: Bench) -> str:
    job = _looping(bench)
    for _ in range(8):
        job.works(16, "in order")
    return "128 frames"


@rule("wrap", "The indices go round without a fault", "virtio 1.3, 2.7.6 and 2.7.8", NET)
def wrap(bench: Bench) -> str:
    job = _looping(bench)
    rounds = 3 * job.tx.num // 16
    for _ in range(rounds):
        job.works(16, "around the ring")
    return f"{rounds * 16} frames on a ring of {job.tx.num}"


@rule("beside_buffers", "Nothing beside a receive buffer is written", "virtio 1.3, 2.7.4 and 2.7.8.2", NET)
def beside_buffers(bench: Bench) -> str:
    job = _looping(bench)
    area = bench.arena().allocate(3 * BUFFER)
    area.write(b"\xc3" * area.size)
    target = area.part(BUFFER, BUFFER)
    job.rx.publish(job.rx.add([(target, True)]))
    job.send(job.frame(700))
    job.kick()
    got = job.rx.collect(1, PATIENCE_S)
    demand(got, "the frame did not come back")
    demand(area.read(BUFFER) == b"\xc3" * BUFFER, "bytes in front of the buffer changed")
    demand(area.read(BUFFER, 2 * BUFFER) == b"\xc3" * BUFFER, "bytes behind the buffer changed")
    rest = area.read(BUFFER - got[0].length, BUFFER + got[0].length)
    if rest != b"\xc3" * len(rest):
        raise CannotTell(f"it wrote more than the {got[0].length} bytes that it reports, which it may (2.7.8.2)")
    return "only what is reported as written"


@rule("sent_stays", "A transmit buffer is not changed", "virtio 1.3, 2.7.5.1 (device-readable)", NET)
def sent_stays(bench: Bench) -> str:
    job = _looping(bench)
    frame = job.frame(600)
    place = job.outbox.part(job.submitted % job.slots * BUFFER, BUFFER)
    job.post()
    job.send(frame)
    before = place.read()
    job.kick()
    job.finish(1)
    demand(place.read() == before, "the buffer of a frame that was sent changed")
    return "unchanged"


@rule(
    "driver_area",
    "The device does not write to descriptors and avail ring",
    "virtio 1.3, 2.7.5 and 2.7.6 (device-readable)",
)
def driver_area(bench: Bench) -> str:
    job = running(bench)
    job.works()
    q = job.main
    job.submit(4)
    size = q.used - q.ring.iova
    before = q.ring.read(size)
    job.kick()
    job.finish(4)
    demand(q.ring.read(size) == before, "the descriptor table or the avail ring changed")
    return f"{size} bytes unchanged"


@rule("exact_buffer", "A receive buffer of exactly the frame's size is enough", _NET, NET)
def exact_buffer(bench: Bench) -> str:
    job = _looping(bench)
    frame = job.frame(300)
    place = bench.arena().allocate(BUFFER).part(0, HEADER + 300)
    head = job.rx.add([(place, True)])
    job.posted[head] = place
    job.rx.publish(head)
    job.send(frame)
    job.kick()
    return job.finish(1, "a buffer of exactly the frame's size")


@rule("no_buffer", "Without a receive buffer a frame is lost and the sender keeps working", f"{_NET}.3", NET)
def no_buffer(bench: Bench) -> str:
    job = _looping(bench)
    for _ in range(3):
        job.send(job.frame())
        job.kick()
        if not job.wait(1, 1.0):
            raise CannotTell("it keeps the frame until there is a receive buffer, which nothing forbids")
        job.sent.clear()
    # frames that could not be received may wait: what comes first is not compared
    job.post()
    job.send(job.frame())
    job.kick()
    demand(job.wait(1), "after it nothing is sent any more")
    return "three frames without a buffer"


@rule("small_buffer", "A receive buffer that is too small is not overrun", f"{_NET}.3; 2.7.4", NET)
def small_buffer(bench: Bench) -> str:
    job = _looping(bench)
    area = bench.arena().allocate(4096)
    area.write(b"\x3c" * 4096)
    job.rx.publish(job.rx.add([(area.part(64, 100), True)]))
    job.send(job.frame(1000))
    job.kick()
    job.wait(1, 0.3)
    demand(area.read(64) == b"\x3c" * 64, "bytes in front of the buffer changed")
    demand(area.read(3932, 164) == b"\x3c" * 3932, "bytes behind a buffer of 100 changed")
    return "nothing beyond it was written"


def _header_back(job: NetWork) -> bytes:
    """Send a frame and return the header that it comes back with."""
    job.post()
    place = next(reversed(job.posted.values()))
    job.send(job.frame())
    job.kick()
    demand(job.rx.collect(1, PATIENCE_S), "the frame did not come back")
    return place.read(HEADER)


@rule("header", "The header of a received frame says nothing that was not negotiated", f"{_NET}.4 and 5.1.6.4", NET)
def header(bench: Bench) -> str:
    head = _header_back(_looping(bench))
    demand(head[1] == 0, f"gso_type {head[1]} for a frame that is not large: {head.hex()}")
    if Feature.GUEST_CSUM not in bench.facts.features:
        demand(head[0] == 0, f"flags {head[0]:#x} without GUEST_CSUM: {head.hex()}")
    return head.hex()


@rule("num_buffers", "A received frame says that it took one buffer", "virtio 1.3, 5.1.6.4.1 (num_buffers)", NET)
def num_buffers(bench: Bench) -> str:
    return _one_buffer(_looping(bench))


def _one_buffer(job: NetWork) -> str:
    number = int.from_bytes(_header_back(job)[10:12], "little")
    demand(number == 1, f"num_buffers {number} (virtio 1.3, 5.1.6.4.1: the device MUST set it to 1 without MRG_RXBUF)")
    return "1"


@rule(
    "num_buffers_alone",
    "Without MRG_RXBUF the header of a received frame is as long, and says one buffer",
    "virtio 1.3, 5.1.6.1 and 5.1.6.4.1",
    NET,
)
def num_buffers_alone(bench: Bench) -> str:
    if Feature.MRG_RXBUF not in bench.facts.features:
        raise NotOffered("the device does not have MRG_RXBUF: data.num_buffers says it")
    bench.own()
    bench.map()
    try:
        bench.negotiate(int(bench.facts.features & ~Feature.MRG_RXBUF))
    except (Broken, KernelError) as e:
        raise CannotTell(f"without MRG_RXBUF it does not start ({e}), and a subset only SHOULD be accepted") from e
    job = NetWork(bench).start()
    job.works()
    job.needs_loop()
    return _one_buffer(job)


@rule(
    "after_suspend",
    "Frames stay whole over suspend and resume",
    f"{_NET}; drivers/vhost/vdpa.c:vhost_vdpa_suspend",
    NET,
    20,
)
def after_suspend(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND, BackendFeature.RESUME)
    job = _looping(bench)
    for _ in range(6):
        job.give(8)
        bench.c.suspend()
        bench.c.resume()
        job.kick()
        job.finish(8, "suspended and resumed")
    return "48 frames over 6 suspensions"


@rule("foreign_address", "A frame to another device's address is sent", _NET, NET)
def foreign_address(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    job.post()
    job.send(b"\x52\x54\x93\x11\x22\x33" + b"\x52\x54\x91\x76\x64\x02" + ETHERTYPE + bytes(FRAME - 14))
    job.kick()
    demand(job.wait(1), "its buffer was not given back")
    return "its buffer was given back"
