# SPDX-License-Identifier: MIT
"""Chains, indirect tables and the event index."""

from __future__ import annotations

from ....net.features import Feature
from ..bench import PATIENCE_S, REST_S, Bench
from ..queue import INDIRECT, NEXT, Desc
from ..rule import NET, CannotTell, Group, demand
from ..work import BUFFER, HEADER, NetWork, running, running_net, work

GROUP = Group("rings", "chains, indirect tables, event index")
rule = GROUP.rule
_FRAMING = "virtio 1.3, 2.7.4 (no assumption on framing)"
_INDIRECT = "virtio 1.3, 2.7.5.3"
_EVENT = "virtio 1.3, 2.7.7 and 2.7.10"


def _started(bench: Bench, feature: Feature) -> NetWork:
    bench.needs_feature(feature)
    bench.prepare(int(bench.facts.features | feature))
    return NetWork(bench).start()


def _send_in(bench: Bench, parts: list[int], may_be_too_long: bool = False) -> str:
    job = running_net(bench)
    job.works()
    job.post()
    job.send(job.frame(400), parts)
    job.kick()
    got = job.wait(1)
    if not got and may_be_too_long:
        raise CannotTell(f"not sent: a device may limit the descriptors of a chain to less than {len(parts) + 1}")
    demand(got, f"{len(parts) + 1} descriptors: the frame was not sent within {PATIENCE_S:g} s")
    return job.check(got)


@rule("two_parts", "A frame whose header has a descriptor of its own is one frame", _FRAMING, NET)
def two_parts(bench: Bench) -> str:
    return _send_in(bench, [HEADER])


@rule("header_split", "A header that is split between descriptors is one header", _FRAMING, NET)
def header_split(bench: Bench) -> str:
    return _send_in(bench, [5, 3, 1])


@rule(
    "many_parts",
    "A frame in 32 descriptors is one frame",
    "virtio 1.3, 2.7.4.1 (no assumption on framing; there may be a reasonable limit)",
    NET,
)
def many_parts(bench: Bench) -> str:
    if bench.ring_size(0, 1) < 64:
        raise CannotTell("the rings are too small")
    return _send_in(bench, [12] * 31, may_be_too_long=True)


@rule("receive_parts", "A receive buffer in several descriptors is filled from its begin on", _FRAMING, NET)
def receive_parts(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    job.needs_loop()
    # a part for the header alone, and one that the frame begins in
    layouts = ((12, 20, 100, 500, 1400), (20, 60, 500, 1400))
    for sizes in layouts:
        _receive_in(job, sizes)
    return " and ".join(str(len(sizes)) for sizes in layouts) + " descriptors"


def _receive_in(job: NetWork, sizes: tuple[int, ...]) -> None:
    area = job.bench.arena().allocate(4096)
    area.write(b"\xee" * 4096)
    parts, at = [], 0
    for size in sizes:
        parts.append((area.part(at, size), True))
        at += size + 16
    job.rx.publish(job.rx.add(parts))
    frame = job.frame(900)
    job.send(frame)
    job.kick()
    demand(job.wait(1), "the frame was not sent")
    got = job.rx.collect(1, PATIENCE_S)
    demand(got, "the frame did not come back")
    data = b"".join(place.read() for place, _ in parts)[: got[0].length]
    demand(data[HEADER:] == frame, "the frame came back with other bytes")
    at = 0
    for size in sizes:
        demand(area.read(16, at + size) == b"\xee" * 16, "it wrote between the parts of the buffer")
        at += size + 16


@rule("any_head", "Descriptors may be chained in any order", "virtio 1.3, 2.7.5", NET)
def any_head(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    frame = job.frame(200)
    place = bench.arena().allocate(BUFFER)
    data = bytes(HEADER) + frame
    place.write(data)
    last = job.tx.num - 1
    job.tx.write(last, [Desc(place.iova, 50, NEXT, 20)])
    job.tx.write(20, [Desc(place.iova + 50, 50, NEXT, 10)])
    job.tx.write(10, [Desc(place.iova + 100, len(data) - 100)])
    job.post()
    job.tx.publish(last)
    job.sent.append(frame)
    job.kick()
    got = job.wait(1)
    demand(got and got[0].id == last, f"used {got}, head {last} was made available")
    return job.check(got)


@rule("next_ignored", "Without NEXT the next field means nothing", "virtio 1.3, 2.7.5", NET)
def next_ignored(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    frame = job.frame()
    place = bench.arena().allocate(BUFFER).part(0, HEADER + len(frame))
    place.write(bytes(HEADER) + frame)
    job.post()
    job.tx.write(7, [Desc(place.iova, place.size, 0, 0xFFFF)])
    job.tx.publish(7)
    job.sent.append(frame)
    job.kick()
    return job.finish(1, "a next field of 65535 without NEXT")


@rule("used_head", "The used ring names heads that were made available, each once", "virtio 1.3, 2.7.8")
def used_head(bench: Bench) -> str:
    job = running(bench)
    for _ in range(10):
        job.give(4)
        got = job.wait(4)
        ids = [used.id for used in got]
        demand(len(set(ids)) == len(ids) == 4, f"used ids {ids}")
        job.check(got)
    return "40 heads"


@rule("used_wrap", "Behind its last element the used ring is written from its begin again", "virtio 1.3, 2.7.8", NET)
def used_wrap(bench: Bench) -> str:
    bench.prepare()
    job = NetWork(bench, num=bench.ring_size(0, 1, most=16)).start()
    if job.tx.num < 8:
        raise CannotTell("the rings are too small")
    frame = job.frame()
    place = bench.arena().allocate(BUFFER).part(0, HEADER + len(frame))
    place.write(bytes(HEADER) + frame)
    # three descriptors each: heads come round at another time than elements, so that an old one is not the right one
    parts = [(place.part(0, HEADER), False), (place.part(HEADER, 8), False)]
    parts.append((place.part(HEADER + 8, len(frame) - 8), False))
    for number in range(3 * job.tx.num):
        head = job.tx.add(parts)
        job.tx.publish(head)
        job.tx.kick()
        got = job.tx.collect(1, PATIENCE_S)
        demand(got and got[0].id == head, f"element {number}: used {got}, head {head} was made available")
    return f"{3 * job.tx.num} elements of a ring of {job.tx.num}"


@rule("transmit_length", "A device-readable chain has used length 0", "virtio 1.3, 2.7.8.2", NET)
def transmit_length(bench: Bench) -> str:
    job = running_net(bench)
    job.give(4)
    got = job.wait(4)
    lengths = [used.length for used in got]
    demand(not any(lengths), f"TX used lengths {lengths}: nothing in them can be written")
    return "0"


@rule(
    "receive_length", "The used length of a received frame is what was written", "virtio 1.3, 2.7.8.2 and 5.1.6.4", NET
)
def receive_length(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    job.needs_loop()
    frame = job.frame(333)
    job.post()
    job.send(frame)
    job.kick()
    got = job.rx.collect(1, PATIENCE_S)
    demand(got, "the frame did not come back")
    demand(got[0].length == HEADER + 333, f"used length {got[0].length} for {HEADER} + 333 bytes")
    return f"{got[0].length}"


@rule("full", "A full ring is worked off", "virtio 1.3, 2.7")
def full(bench: Bench) -> str:
    bench.prepare()
    job = work(bench, num=bench.ring_size(0, 1, most=32)).start()
    count = job.slots
    for _ in range(3):
        job.works(count, f"{count} at a time")
    return f"{count} at a time, three times"


@rule("one_kick", "All that is made available before one kick is used", "virtio 1.3, 2.7.13.4 and 2.9", NET)
def one_kick(bench: Bench) -> str:
    bench.prepare()
    job = NetWork(bench, num=bench.ring_size(0, 1, most=256)).start()
    job.works()
    frame = job.frame()
    place = bench.arena().allocate(BUFFER).part(0, HEADER + len(frame))
    place.write(bytes(HEADER) + frame)
    # a receive buffer for each, all in one place: what arrives there is another rule's affair
    inbox, count = bench.arena().allocate(BUFFER), min(job.tx.num, job.rx.num)
    job.rx.publish(*(job.rx.add([(inbox, True)]) for _ in range(count)))
    job.rx.kick()
    job.tx.publish(*(job.tx.add([(place, False)]) for _ in range(count)))
    job.tx.kick()
    got = job.tx.collect(count, PATIENCE_S)
    demand(len(got) == count, f"{len(got)} of {count} that were kicked once were used within {PATIENCE_S:g} s")
    return f"{count} at once"


def _indirect(job: NetWork, parts: list[int]) -> str:
    frame = job.frame(500)
    place = job.bench.arena().allocate(BUFFER)
    data = bytes(HEADER) + frame
    place.write(data)
    sizes = [*parts, len(data) - sum(parts)]
    table, at = [], 0
    for i, size in enumerate(sizes):
        more = i < len(sizes) - 1
        table.append(Desc(place.iova + at, size, NEXT if more else 0, i + 1 if more else 0))
        at += size
    where = job.bench.arena().allocate(16 * len(table))
    job.tx.table(where, table)
    job.post()
    job.tx.write(0, [Desc(where.iova, 16 * len(table), INDIRECT)])
    job.tx.publish(0)
    job.sent.append(frame)
    job.submitted += 1
    job.kick()
    return job.finish(1, f"an indirect table of {len(table)}")


@rule("indirect_one", "An indirect table with one descriptor works", _INDIRECT, NET)
def indirect_one(bench: Bench) -> str:
    job = _started(bench, Feature.INDIRECT_DESC)
    job.works()
    return _indirect(job, [])


@rule("indirect_many", "An indirect table with many descriptors works", _INDIRECT, NET)
def indirect_many(bench: Bench) -> str:
    job = _started(bench, Feature.INDIRECT_DESC)
    job.works()
    for count in (1, 7, 31):
        _indirect(job, [12] * count)
    return "2, 8 and 32 descriptors"


@rule("indirect_and_direct", "Chains with and without a table can be mixed", _INDIRECT, NET)
def indirect_and_direct(bench: Bench) -> str:
    job = _started(bench, Feature.INDIRECT_DESC)
    for _ in range(3):
        job.works(2)
        _indirect(job, [HEADER])
    return "mixed"


@rule("event_kick", "The device says up to where it has looked (avail_event)", _EVENT, NET)
def event_kick(bench: Bench) -> str:
    job = _started(bench, Feature.EVENT_IDX)
    for _ in range(5):
        job.tx.set_used_event(job.tx.taken)
        job.rx.set_used_event(job.rx.taken)
        job.works()
    at = job.tx.avail_event
    behind = (job.tx.avail_index - at) & 0xFFFF
    if behind:
        # a device that looks by itself needs no kick, and need not say how far it got
        seen = f"avail_event {at}, though the device used everything up to {job.tx.avail_index}"
        job.submit()
        job.finish(1, f"{seen}: a driver would not kick")
        return f"{seen}, and it needs no kick"
    return f"avail_event {at}"


@rule("event_wanted", "An interrupt comes when the used index passes used_event", _EVENT, NET)
def event_wanted(bench: Bench) -> str:
    job = _started(bench, Feature.EVENT_IDX)
    job.works()
    for _ in range(5):
        job.tx.called(0)
        job.tx.set_used_event(job.tx.taken)
        job.give()
        demand(job.tx.called(PATIENCE_S), f"used_event {job.tx.taken}, used index {job.tx.used_index}, no interrupt")
        job.finish(1)
    return "5 times"


@rule("event_within", "An interrupt comes when the used index passes used_event by more than one", _EVENT, NET)
def event_within(bench: Bench) -> str:
    job = _started(bench, Feature.EVENT_IDX)
    job.works()
    for _ in range(5):
        job.tx.called(0.02)
        job.tx.called(0)
        job.tx.set_used_event(job.tx.taken)
        job.give(4)
        demand(job.tx.called(PATIENCE_S), f"used_event {job.tx.taken}, used index {job.tx.used_index}, no interrupt")
        job.finish(4)
    return "5 times 4"


@rule("event_not_wanted", "None comes before it passes used_event", f"{_EVENT} (SHOULD NOT)", NET)
def event_not_wanted(bench: Bench) -> str:
    job = _started(bench, Feature.EVENT_IDX)
    job.works()
    job.tx.set_used_event(job.tx.taken + 100)
    job.tx.called(0.02)
    job.tx.called(0)
    job.works(3)
    if job.tx.called(REST_S):
        raise CannotTell("an interrupt was sent; the specification says SHOULD NOT")
    return "none"


@rule("event_every_third", "With used_event three ahead an interrupt comes at the third", _EVENT, NET)
def event_every_third(bench: Bench) -> str:
    job = _started(bench, Feature.EVENT_IDX)
    job.works()
    job.tx.called(0.02)
    job.tx.called(0)
    for _ in range(4):
        job.tx.set_used_event(job.tx.taken + 2)
        for _ in range(3):
            job.give()
        demand(job.tx.called(PATIENCE_S), "three were used, no interrupt")
        job.finish(3)
    return "4 times"


@rule("event_wrap", "The event index works where the indices wrap", _EVENT, NET)
def event_wrap(bench: Bench) -> str:
    bench.needs_feature(Feature.EVENT_IDX)
    bench.prepare(int(bench.facts.features | Feature.EVENT_IDX))
    job = NetWork(bench, base=65530).start(65530)
    for _ in range(12):
        job.tx.called(0)
        job.tx.set_used_event(job.tx.taken)
        job.rx.set_used_event(job.rx.taken)
        job.give()
        demand(job.tx.called(PATIENCE_S), f"used_event {job.tx.taken}, no interrupt")
        job.finish(1)
    return "from 65530 to 6"
