# SPDX-License-Identifier: MIT
"""The control queue of a network device, command by command, with bad ones."""

from __future__ import annotations

import os
import struct

from ....base.errors import KernelError
from ....base.uapi import Status
from ....net.control import (
    ANNOUNCE_ACK,
    ERR,
    GUEST_OFFLOADS,
    GUEST_OFFLOADS_SET,
    MAC_ADDR_SET,
    MAC_TABLE_SET,
    OK,
    VLAN_ADD,
    VLAN_DEL,
    VQ_PAIRS_SET,
    Class,
    Rx,
    command,
    mac_table,
)
from ....net.features import Feature
from ..bench import PATIENCE_S, REST_S, Bench
from ..rule import NET, Broken, CannotTell, Group, NotOffered, demand
from ..work import Control, NetWork, controlled

GROUP = Group("control", "control queue")
rule = GROUP.rule
_CVQ = "virtio 1.3, 5.1.6.5"
_MAC = bytes.fromhex("525491766409")
_NOBODY = 0xEE
"""A command class that does not exist."""
_THIRD = 2


def _with(bench: Bench, feature: Feature) -> Control:
    bench.needs_feature(feature)
    if feature not in bench.facts.features:
        return controlled(bench, int(bench.facts.features | feature))[1]
    return controlled(bench)[1]


def _without(bench: Bench, feature: Feature) -> Control:
    bench.needs_feature(feature)
    gone = feature
    if feature is Feature.CTRL_RX:
        gone |= Feature.CTRL_RX_EXTRA
    try:
        return controlled(bench, int(bench.facts.features & ~gone))[1]
    except (Broken, KernelError) as e:
        raise CannotTell(f"without {feature.name} it does not start ({e}), and a subset only SHOULD be accepted") from e


@rule("unknown_class", "A command of an unknown class is answered with ERR", _CVQ, NET)
def unknown_class(bench: Bench) -> str:
    return controlled(bench)[1].refuses(command(Class.RX, 0)[:0] + bytes([_NOBODY, 0]), f"class {_NOBODY:#x}")


@rule("unknown_command", "An unknown command of a known class is answered with ERR", _CVQ, NET)
def unknown_command(bench: Bench) -> str:
    own = bench.facts.offered & (
        Feature.CTRL_RX | Feature.CTRL_VLAN | Feature.CTRL_MAC_ADDR | Feature.MQ | Feature.GUEST_ANNOUNCE
        | Feature.CTRL_GUEST_OFFLOADS
    )  # fmt: skip
    control = controlled(bench, int(bench.facts.features | own))[1]
    # each with what a command of its class carries: only its number is wrong
    carried = {
        Class.RX: bytes(1),
        Class.MAC: bench.c.get_config(0, 6),
        Class.VLAN: struct.pack("<H", 1),
        Class.ANNOUNCE: b"",
        Class.MQ: struct.pack("<H", 1),
        Class.GUEST_OFFLOADS: bytes(8),
    }
    for kind, data in carried.items():
        control.refuses(command(kind, _NOBODY, data), f"{kind.name} {_NOBODY:#x}")
    return ", ".join(kind.name for kind in carried)


@rule(
    "one_byte",
    "A command of one byte is answered with ERR",
    f"{_CVQ}; 2.7.8 (the device returns what it consumed)",
    NET,
)
def one_byte(bench: Bench) -> str:
    return controlled(bench)[1].refuses(bytes([Class.MAC]), "one byte")


@rule("after_one_byte", "After a command that is too short the queue keeps working", f"{_CVQ}; 2.7.8", NET)
def after_one_byte(bench: Bench) -> str:
    control = controlled(bench)[1]
    control.submit(bytes([Class.MAC]))
    control.queue.kick()
    control.queue.collect(1, 0.2)
    control.submit(bytes([_NOBODY, 0]))
    control.queue.kick()
    demand(control.queue.collect(1, 1.0), "the next command was not answered")
    return "the next command was answered"


@rule("answer_length", "The answer is one byte, and so is the used length", f"{_CVQ}; 2.7.8.2", NET)
def answer_length(bench: Bench) -> str:
    control = controlled(bench)[1]
    control.submit(bytes([_NOBODY, 0]))
    control.queue.kick()
    got = control.queue.collect(1, PATIENCE_S)
    demand(got, "no answer")
    demand(got[0].length <= 1, f"used length {got[0].length}, and there is room for one byte")
    if not got[0].length:
        raise CannotTell("used length 0: an underestimate is permitted")
    return "used length 1"


@rule("answer_room", "With more room for the answer than it needs, only the first byte is written", _CVQ, NET)
def answer_room(bench: Bench) -> str:
    control = controlled(bench)[1]
    control.submit(bytes([_NOBODY, 0]), 8)
    control.queue.kick()
    demand(control.queue.collect(1, PATIENCE_S), "no answer")
    written = control.room.read(8, 4096)
    if written[1:] != b"\xee" * 7:
        raise CannotTell(f"{written.hex()} in the room for the answer: more may be written than is used (2.7.8.2)")
    return "one byte written"


@rule(
    "each_its_answer",
    "Each of several commands gets its own answer",
    f"{_CVQ}; drivers/vdpa/vdpa_sim/vdpa_sim_net.c:vdpasim_handle_cvq",
    NET,
)
def each_its_answer(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_MAC_ADDR)
    good, bad = command(Class.MAC, MAC_ADDR_SET, _MAC), bytes([_NOBODY, 0])
    heads, places = [], []
    q = control.queue
    for i, text in enumerate((good, bad, good, bad)):
        place = control.room.part(i * 64, 64)
        place.write(text.ljust(32, b"\0") + b"\xee")
        places.append(place)
        heads.append(q.add([(place.part(0, len(text)), False), (place.part(32, 1), True)]))
    q.publish(*heads)
    q.kick()
    demand(len(q.collect(4, PATIENCE_S)) == 4, "not every command was answered")
    acks = [place.read(1, 32)[0] for place in places]
    demand(acks == [OK, ERR, OK, ERR], f"good, bad, good, bad were answered with {acks}")
    return "good, bad, good, bad: OK, ERR, OK, ERR"


@rule("many", "It keeps working after many commands, past the end of its ring", _CVQ, NET)
def many(bench: Bench) -> str:
    control = controlled(bench)[1]
    for _ in range(40):
        control.command(bytes([_NOBODY, 0]))
    return f"40 commands on a ring of {control.queue.num}"


@rule("one_kick", "All commands that are made available before one kick are answered", f"{_CVQ}; 2.9", NET)
def one_kick(bench: Bench) -> str:
    control = controlled(bench, most=64)[1]
    q, count = control.queue, control.queue.num // 2
    control.room.write(bytes([_NOBODY, 0]))
    answer = control.room.part(4096, 1)
    q.publish(*(q.add([(control.room.part(0, 2), False), (answer, True)]) for _ in range(count)))
    q.kick()
    got = q.collect(count, PATIENCE_S)
    demand(len(got) == count, f"{len(got)} of {count} that were kicked once were answered within {PATIENCE_S:g} s")
    return f"{count} at once"


@rule("interrupts", "An answer interrupts the driver", f"{_CVQ}; 2.7.7.2", NET)
def interrupts(bench: Bench) -> str:
    control = controlled(bench)[1]
    control.queue.called(0)
    control.submit(bytes([_NOBODY, 0]))
    control.queue.kick()
    demand(control.queue.called(PATIENCE_S), "no interrupt")
    return "interrupted"


@rule("beside_data", "Commands and data do not disturb each other", _CVQ, NET)
def beside_data(bench: Bench) -> str:
    job, control = controlled(bench)
    for _ in range(10):
        job.give(2)
        control.command(bytes([_NOBODY, 0]))
        job.finish(2, "beside commands")
    return "10 commands, 20 frames"


@rule("after_reset", "After a reset it works again", f"{_CVQ}; 2.4", NET)
def after_reset(bench: Bench) -> str:
    index = bench.needs_control()
    controlled(bench)[1].command(bytes([_NOBODY, 0]))
    bench.restart()
    control = Control(bench, index)
    control.set_up()
    NetWork(bench).set_up()
    bench.driver_ok()
    return f"answered with {control.command(bytes([_NOBODY, 0]))}"


@rule("not_enabled", "A control queue that is not enabled is not touched", "virtio 1.3, 4.2.2.1 (QueueReady)", NET)
def not_enabled(bench: Bench) -> str:
    index = bench.needs_control()
    bench.prepare()
    NetWork(bench).set_up()
    control = Control(bench, index)
    control.set_up(enable=False)
    bench.driver_ok()
    control.submit(bytes([_NOBODY, 0]))
    control.queue.kick()
    demand(control.answer(REST_S) is None, "a command was answered")
    return "no answer"


@rule(
    "place",
    "Without MQ and RSS the control queue is the third queue",
    "virtio 1.3, 5.1.2; drivers/vdpa/mlx5/net/mlx5_vnet.c:ctrl_vq_idx",
    NET,
)
def place(bench: Bench) -> str:
    bench.needs_control()
    if bench.facts.vqs_count <= _THIRD + 1:
        raise NotOffered("it is the third queue in any case")
    bench.own()
    bench.map()
    try:
        bench.negotiate(int(bench.facts.features & ~(Feature.MQ | Feature.RSS)))
    except (Broken, KernelError) as e:
        raise CannotTell(f"without MQ it does not start ({e}), and a subset only SHOULD be accepted") from e
    NetWork(bench).set_up()
    control = Control(bench, _THIRD)
    control.set_up()
    bench.driver_ok()
    return control.refuses(bytes([_NOBODY, 0]), f"queue {_THIRD}, class {_NOBODY:#x}")


@rule("mac_set", "MAC_ADDR_SET sets the address that the configuration shows", f"{_CVQ}.2; 5.1.4", NET)
def mac_set(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_MAC_ADDR)
    before = bench.c.get_config(0, 6)
    control.accepts(command(Class.MAC, MAC_ADDR_SET, _MAC), "MAC_ADDR_SET")
    after = bench.c.get_config(0, 6)
    control.command(command(Class.MAC, MAC_ADDR_SET, before))
    demand(after == _MAC, f"set {_MAC.hex(':')}, the configuration shows {after.hex(':')}")
    return f"{_MAC.hex(':')}, and put back"


@rule("mac_short", "MAC_ADDR_SET with half an address is answered with ERR and changes nothing", f"{_CVQ}.2", NET)
def mac_short(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_MAC_ADDR)
    before = bench.c.get_config(0, 6)
    ack = control.command(command(Class.MAC, MAC_ADDR_SET, bytes(b ^ 0x7E for b in before[:3])))
    after = bench.c.get_config(0, 6)
    if after != before:
        control.command(command(Class.MAC, MAC_ADDR_SET, before))
    demand(ack == ERR, "answered with OK")
    demand(after == before, f"answered with ERR, but {before.hex(':')} became {after.hex(':')}")
    return "ERR, and the address stays"


@rule("mac_empty", "MAC_ADDR_SET without an address is answered with ERR", f"{_CVQ}.2", NET)
def mac_empty(bench: Bench) -> str:
    return _with(bench, Feature.CTRL_MAC_ADDR).refuses(command(Class.MAC, MAC_ADDR_SET), "no address")


@rule("mac_not_negotiated", "MAC_ADDR_SET without CTRL_MAC_ADDR is answered with ERR", f"{_CVQ}.2; 2.2.1", NET)
def mac_not_negotiated(bench: Bench) -> str:
    control = _without(bench, Feature.CTRL_MAC_ADDR)
    before = bench.c.get_config(0, 6)
    ack = control.command(command(Class.MAC, MAC_ADDR_SET, before))
    if ack == OK:
        raise CannotTell("answered with OK: the driver must not send it then, and nothing says what the device does")
    return "ERR"


@rule("mac_table", "MAC_TABLE_SET with two tables is answered with OK", f"{_CVQ}.2", NET)
def mac_table_set(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_RX)
    tables = mac_table([_MAC], [b"\x01\x00\x5e\x00\x00\x01"])
    control.accepts(command(Class.MAC, MAC_TABLE_SET, tables), "one address in each")
    return control.accepts(command(Class.MAC, MAC_TABLE_SET, mac_table([], [])), "empty tables")


@rule("mac_table_short", "MAC_TABLE_SET that is shorter than it says is answered with ERR", f"{_CVQ}.2", NET)
def mac_table_short(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_RX)
    control.refuses(command(Class.MAC, MAC_TABLE_SET, struct.pack("<I", 4) + _MAC), "4 addresses, one there")
    # their bytes are 2^32 + 2: a length of 32 bits takes them for the two that are there
    wraps = struct.pack("<IHI", 0x2AAAAAAB, 0, 0)
    control.refuses(command(Class.MAC, MAC_TABLE_SET, wraps), f"{0x2AAAAAAB} addresses")
    return control.refuses(command(Class.MAC, MAC_TABLE_SET, struct.pack("<I", 0xFFFFFFFF)), "2^32-1 addresses")


def _modes(control: Control, modes: tuple[Rx, ...]) -> str:
    for mode in modes:
        for on in (1, 0):
            control.accepts(command(Class.RX, mode, bytes([on])), f"{mode.name} {on}")
    return " ".join(mode.name for mode in modes)


@rule("rx_modes", "PROMISC and ALLMULTI can be switched on and off", f"{_CVQ}.1", NET)
def rx_modes(bench: Bench) -> str:
    return _modes(_with(bench, Feature.CTRL_RX), (Rx.PROMISC, Rx.ALLMULTI))


@rule("rx_modes_extra", "ALLUNI, NOMULTI, NOUNI and NOBCAST can be switched on and off", f"{_CVQ}.1", NET)
def rx_modes_extra(bench: Bench) -> str:
    return _modes(_with(bench, Feature.CTRL_RX_EXTRA), (Rx.ALLUNI, Rx.NOMULTI, Rx.NOUNI, Rx.NOBCAST))


@rule("rx_mode_short", "A receive mode without its byte is answered with ERR", f"{_CVQ}.1", NET)
def rx_mode_short(bench: Bench) -> str:
    return _with(bench, Feature.CTRL_RX).refuses(command(Class.RX, Rx.PROMISC), "PROMISC without on or off")


@rule("vlan", "A VLAN can be added and deleted", f"{_CVQ}.3", NET)
def vlan(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_VLAN)
    for number in (1, 100, 4094):
        control.accepts(command(Class.VLAN, VLAN_ADD, struct.pack("<H", number)), f"add VLAN {number}")
    for number in (1, 100, 4094):
        control.accepts(command(Class.VLAN, VLAN_DEL, struct.pack("<H", number)), f"delete VLAN {number}")
    return "1, 100 and 4094"


@rule("vlan_short", "A VLAN command without its number is answered with ERR", f"{_CVQ}.3", NET)
def vlan_short(bench: Bench) -> str:
    return _with(bench, Feature.CTRL_VLAN).refuses(command(Class.VLAN, VLAN_ADD, b"\1"), "one byte of two")


@rule("announce_ack", "ANNOUNCE_ACK is answered with OK", f"{_CVQ}.4", NET)
def announce_ack(bench: Bench) -> str:
    control = _with(bench, Feature.GUEST_ANNOUNCE)
    return control.accepts(command(Class.ANNOUNCE, ANNOUNCE_ACK), "ANNOUNCE_ACK")


@rule("offloads", "Offloads that were negotiated can be switched off and on", f"{_CVQ} (offloads)", NET)
def offloads(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_GUEST_OFFLOADS)
    mine = int(bench.facts.features & GUEST_OFFLOADS)
    for value in (0, mine):
        control.accepts(command(Class.GUEST_OFFLOADS, GUEST_OFFLOADS_SET, struct.pack("<Q", value)), f"{value:#x}")
    return f"0, then {mine:#x}"


@rule("offloads_short", "GUEST_OFFLOADS_SET without all of its bits is answered with ERR", f"{_CVQ} (offloads)", NET)
def offloads_short(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_GUEST_OFFLOADS)
    return control.refuses(command(Class.GUEST_OFFLOADS, GUEST_OFFLOADS_SET, bytes(4)), "4 bytes of 8")


@rule("pairs_short", "VQ_PAIRS_SET without its number is answered with ERR", f"{_CVQ}.6", NET)
def pairs_short(bench: Bench) -> str:
    return _with(bench, Feature.MQ).refuses(command(Class.MQ, VQ_PAIRS_SET, b"\1"), "one byte of two")


@rule("no_room", "A command without room for an answer does not stop the device", f"{_CVQ}; 2.7.4", NET)
def no_room(bench: Bench) -> str:
    job, control = controlled(bench)
    control.submit(bytes([_NOBODY, 0]), 0)
    control.queue.kick()
    control.queue.collect(1, 0.2)
    if Status.NEEDS_RESET in bench.c.get_status():
        raise CannotTell("it sets NEEDS_RESET, which it may")
    job.works(2, "after a command without room for an answer")
    return "data still flows"


@rule("split_parts", "A command in many descriptors is one command", f"{_CVQ}; 2.7.4 (no assumption on framing)", NET)
def split_parts(bench: Bench) -> str:
    control = _with(bench, Feature.CTRL_MAC_ADDR)
    before = bench.c.get_config(0, 6)
    text = command(Class.MAC, MAC_ADDR_SET, before)
    control.room.write(text)
    parts = [(control.room.part(i, 1), False) for i in range(len(text))] + [(control.room.part(4096, 1), True)]
    control.queue.publish(control.queue.add(parts))
    control.queue.kick()
    ack = control.answer()
    demand(ack == OK, f"MAC_ADDR_SET, each byte in a descriptor of its own: {'no answer' if ack is None else 'ERR'}")
    return f"{len(text)} descriptors of one byte"


@rule(
    "not_negotiated", "Without CTRL_VQ negotiated no command is taken or executed", "virtio 1.3, 5.1.2 and 2.2.1", NET
)
def not_negotiated(bench: Bench) -> str:
    bench.needs_control()
    alone = bench.facts.features & ~(
        Feature.CTRL_VQ | Feature.CTRL_RX | Feature.CTRL_RX_EXTRA | Feature.CTRL_VLAN | Feature.MQ
        | Feature.CTRL_MAC_ADDR | Feature.CTRL_GUEST_OFFLOADS
    )  # fmt: skip
    bench.own()
    bench.map()
    try:
        bench.negotiate(int(alone))
    except (Broken, KernelError) as e:
        raise NotOffered("the device wants a control queue") from e
    # MQ is not negotiated either, so that this is where it would be
    job = NetWork(bench)
    job.set_up()
    control = Control(bench, _THIRD)
    refused = bench.errno_of(control.set_up)
    bench.driver_ok()
    if refused:
        return f"the queue cannot be set up ({os.strerror(refused)}): {job.works(1, 'without a control queue')}"
    before = bench.c.get_config(0, 6)
    control.submit(command(Class.MAC, MAC_ADDR_SET, _MAC))
    control.queue.kick()
    answered = control.answer(REST_S)
    demand(answered is None, "a command was answered though CTRL_VQ was not negotiated, and no control queue exists")
    demand(bench.c.get_config(0, 6) == before, "a command was executed though CTRL_VQ was not negotiated")
    return job.works(1, "without a control queue")
