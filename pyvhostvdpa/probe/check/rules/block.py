# SPDX-License-Identifier: MIT
"""A disk: read, write, flush, and requests that are wrong. Nothing is written without being allowed."""

from __future__ import annotations

import struct

from ....base.uapi import Status
from ....net.features import Feature
from ..bench import Bench
from ..rule import BLOCK, CannotTell, Group, demand
from ..work import FLUSH, GET_ID, READ, SECTOR, WRITE_OUT, BlockWork, pattern, running_block

GROUP = Group("block", "disk requests")
rule = GROUP.rule
_BLK = "virtio 1.3, 5.2.6"
_OK, _IOERR, _UNSUPP = 0, 1, 2
_F_RO, _F_FLUSH, _F_DISCARD, _F_WRITE_ZEROES = 5, 9, 13, 14
DISCARD, WRITE_ZEROES = 11, 13


def _sectors(bench: Bench) -> int:
    return int.from_bytes(bench.c.get_config(0, 8), "little")


def _writable(bench: Bench) -> BlockWork:
    if not bench.may_write:
        raise CannotTell(
            "it would write to the disk: vhost-vdpa check --write allows that, and puts back what was there"
        )
    if bench.facts.offered & Feature(1 << _F_RO):
        raise CannotTell("the disk is read-only")
    return running_block(bench)


def _read(job: BlockWork, sector: int, size: int = SECTOR) -> bytes:
    status, data = job.do(READ, sector, size)
    demand(status == _OK, f"reading sector {sector}: status {status}")
    return data


def _write(job: BlockWork, sector: int, data: bytes) -> None:
    status, _ = job.do(WRITE_OUT, sector, 0, data)
    demand(status == _OK, f"writing sector {sector}: status {status}")


@rule("read", "A sector can be read, twice the same", f"{_BLK}.2", BLOCK)
def read(bench: Bench) -> str:
    job = running_block(bench)
    first, second = _read(job, 0), _read(job, 0)
    demand(first == second, "sector 0 was read twice with different bytes")
    return "the same twice"


@rule("read_sizes", "Several sectors can be read at once", f"{_BLK}.2", BLOCK)
def read_sizes(bench: Bench) -> str:
    job = running_block(bench)
    whole = _read(job, 0, 2048)
    for i in range(4):
        demand(_read(job, i) == whole[i * SECTOR : (i + 1) * SECTOR], f"sector {i} alone is not what it is among four")
    return "four at once are those four"


@rule(
    "read_length", "The used length of a read is what was written: the data and the status", f"{_BLK}; 2.7.8.2", BLOCK
)
def read_length(bench: Bench) -> str:
    job = running_block(bench)
    job.request(READ, 0, 1024)
    job.kick()
    got = job.wait(1)
    demand(got, "no answer")
    demand(got[0].length <= 1025, f"used length {got[0].length} for 1024 bytes and the status")
    if got[0].length < 1025:
        raise CannotTell(f"used length {got[0].length}, not 1025: an underestimate is permitted (2.7.8.2)")
    return "1025"


@rule("last_sector", "The last sector can be read", f"{_BLK}.2; 5.2.4 (capacity)", BLOCK)
def last_sector(bench: Bench) -> str:
    job = running_block(bench)
    last = _sectors(bench) - 1
    _read(job, last)
    return f"sector {last}"


@rule("beyond_end", "Reading beyond the end is answered with IOERR", f"{_BLK}.2", BLOCK)
def beyond_end(bench: Bench) -> str:
    job = running_block(bench)
    end = _sectors(bench)
    for sector in (end, end + 1000, (1 << 55) - 1):
        status, _ = job.do(READ, sector, SECTOR)
        demand(status == _IOERR, f"sector {sector} of {end}: status {status}")
    return "IOERR"


@rule("across_end", "Reading across the end is answered with IOERR", f"{_BLK}.2", BLOCK)
def across_end(bench: Bench) -> str:
    job = running_block(bench)
    status, _ = job.do(READ, _sectors(bench) - 1, 2 * SECTOR)
    demand(status == _IOERR, f"status {status}")
    return "IOERR"


@rule("flush", "A flush is answered with OK", f"{_BLK}.2 (VIRTIO_BLK_F_FLUSH)", BLOCK)
def flush(bench: Bench) -> str:
    bench.needs_feature(Feature(1 << _F_FLUSH))
    job = running_block(bench)
    status, _ = job.do(FLUSH, 0)
    demand(status == _OK, f"status {status}")
    return "OK"


@rule("get_id", "The disk returns its identifier in 20 bytes", f"{_BLK} (VIRTIO_BLK_T_GET_ID)", BLOCK)
def get_id(bench: Bench) -> str:
    job = running_block(bench)
    status, data = job.do(GET_ID, 0, 20)
    if status == _UNSUPP:
        raise CannotTell("UNSUPP: the disk returns none, which it may")
    demand(status == _OK, f"status {status}")
    return repr(data.rstrip(b"\0").decode(errors="replace"))


@rule("unknown_type", "A request of an unknown type is answered with UNSUPP", f"{_BLK}.2 (VIRTIO_BLK_S_UNSUPP)", BLOCK)
def unknown_type(bench: Bench) -> str:
    job = running_block(bench)
    status, _ = job.do(0x7777, 0)
    demand(status != _OK, "status 0 for type 0x7777")
    demand(status == _UNSUPP, f"status {status} for type 0x7777, not {_UNSUPP}")
    return "UNSUPP"


@rule("status_last", "Only the data and the status are written", f"{_BLK}; 2.7.4", BLOCK)
def status_last(bench: Bench) -> str:
    job = running_block(bench)
    head = job.request(READ, 0, SECTOR)
    place = job.waiting[head]
    job.kick()
    demand(job.wait(1), "no answer")
    behind = place.read(1024, 4096 + SECTOR + 1)
    demand(behind == b"\xee" * 1024, "bytes behind the status changed")
    demand(place.read(4096 - 16, 16) == bytes(4096 - 16), "bytes in front of the data changed")
    return "nothing beside them"


@rule("many", "Many requests at once are all answered", f"{_BLK}; 2.7", BLOCK)
def many(bench: Bench) -> str:
    job = running_block(bench)
    for _ in range(6):
        job.works(job.slots, f"{job.slots} at once")
    return f"{6 * job.slots} requests, {job.slots} at once"


@rule(
    "header_split",
    "A request whose header is split between descriptors is one request",
    "virtio 1.3, 2.7.4 (no assumption on framing)",
    BLOCK,
)
def header_split(bench: Bench) -> str:
    job = running_block(bench)
    expected = _read(job, 0)
    area = bench.arena().allocate(8192)
    area.write(struct.pack("<IIQ", READ, 0, 0))
    parts = [(area.part(0, 4), False), (area.part(4, 12), False), (area.part(4096, 200), True)]
    parts += [(area.part(4296, 312), True), (area.part(4608, 1), True)]
    area.write(b"\xee", 4608)
    job.main.publish(job.main.add(parts))
    job.kick()
    demand(job.main.collect(1, 3.0), "no answer")
    demand(area.read(1, 4608) == b"\0", f"status {area.read(1, 4608)[0]}")
    demand(area.read(SECTOR, 4096) == expected, "other bytes")
    return "five descriptors"


@rule("no_status", "A request without room for a status does no harm", f"{_BLK}; 2.1.2", BLOCK)
def no_status(bench: Bench) -> str:
    job = running_block(bench)
    area = bench.arena().allocate(4096)
    area.write(struct.pack("<IIQ", READ, 0, 0))
    job.main.publish(job.main.add([(area.part(0, 16), False)]))
    job.kick()
    job.main.collect(1, 0.2)
    if Status.NEEDS_RESET in bench.c.get_status():
        raise CannotTell("it sets NEEDS_RESET, which it may")
    return job.works(2, "after a request without a status")


@rule("short_header", "A request with half a header does no harm", f"{_BLK}; 2.1.2", BLOCK)
def short_header(bench: Bench) -> str:
    job = running_block(bench)
    area = bench.arena().allocate(4096)
    job.main.publish(job.main.add([(area.part(0, 8), False), (area.part(64, 1), True)]))
    job.kick()
    job.main.collect(1, 0.2)
    if Status.NEEDS_RESET in bench.c.get_status():
        raise CannotTell("it sets NEEDS_RESET, which it may")
    return job.works(2, "after a request with half a header")


@rule("write", "Written data is read back", f"{_BLK}.2", BLOCK)
def write(bench: Bench) -> str:
    job = _writable(bench)
    old = _read(job, 0, 2048)
    try:
        for seed in (1, 2):
            data = pattern(2048, seed)
            _write(job, 0, data)
            demand(_read(job, 0, 2048) == data, "other bytes were read than were written")
    finally:
        _write(job, 0, old)
    demand(_read(job, 0, 2048) == old, "what was there could not be put back")
    return "2048 bytes, twice; what was there is there again"


@rule("write_beside", "A write changes no other sector", f"{_BLK}.2", BLOCK)
def write_beside(bench: Bench) -> str:
    job = _writable(bench)
    old = _read(job, 0, 2048)
    try:
        _write(job, 1, pattern(SECTOR, 3))
        now = _read(job, 0, 2048)
        demand(now[:SECTOR] == old[:SECTOR] and now[2 * SECTOR :] == old[2 * SECTOR :], "another sector changed")
    finally:
        _write(job, 0, old)
    return "only the sector that was written"


@rule("write_kept", "Written data survives a reset", f"{_BLK}.2; 2.4", BLOCK)
def write_kept(bench: Bench) -> str:
    job = _writable(bench)
    old = _read(job, 0)
    data = pattern(SECTOR, 4)
    _write(job, 0, data)
    job.do(FLUSH, 0)
    bench.restart()
    job = BlockWork(bench).start()
    try:
        demand(_read(job, 0) == data, "other bytes after a reset")
    finally:
        _write(job, 0, old)
    return "there after a flush and a reset"


@rule("write_beyond_end", "Writing beyond the end is answered with IOERR", f"{_BLK}.2", BLOCK)
def write_beyond_end(bench: Bench) -> str:
    job = _writable(bench)
    status, _ = job.do(WRITE_OUT, _sectors(bench), 0, bytes(SECTOR))
    demand(status == _IOERR, f"status {status}")
    return "IOERR"


@rule("write_zeroes", "WRITE_ZEROES makes sectors 0", f"{_BLK}.2 (VIRTIO_BLK_F_WRITE_ZEROES)", BLOCK)
def write_zeroes(bench: Bench) -> str:
    bench.needs_feature(Feature(1 << _F_WRITE_ZEROES))
    job = _writable(bench)
    old = _read(job, 0, 1024)
    try:
        _write(job, 0, pattern(1024, 5))
        status, _ = job.do(WRITE_ZEROES, 0, 0, struct.pack("<QII", 0, 1, 0))
        demand(status == _OK, f"status {status}")
        now = _read(job, 0, 1024)
        demand(now[:SECTOR] == bytes(SECTOR), "sector 0 is not 0")
        demand(now[SECTOR:] == pattern(1024, 5)[SECTOR:], "sector 1 changed as well")
    finally:
        _write(job, 0, old)
    return "one sector"


@rule("discard_flags", "DISCARD with unknown flags is answered with UNSUPP", f"{_BLK}.2", BLOCK)
def discard_flags(bench: Bench) -> str:
    bench.needs_feature(Feature(1 << _F_DISCARD))
    job = _writable(bench)
    status, _ = job.do(DISCARD, 0, 0, struct.pack("<QII", 0, 1, 0xFFFFFFFE))
    demand(status == _UNSUPP, f"status {status}")
    return "UNSUPP"
