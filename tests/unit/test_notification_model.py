"""Every interleaving of a driver, the relay and a device on small rings: no wake-up is lost.

A model, apart from the code: what each party stores, loads and raises, one
access a step, in the order of ``svq_thread.c``, ``svq.c``, ``used_relay.c`` (and
``virtio_ring.c``, ``virtio_net.c`` for the driver). Indices are modulo twice
the ring, as 65,536 is twice the largest ring, so that runs are unlimited and
states are not. Stores may wait in a buffer, as on x86, where a fence, or a
system call, empties it. What is true of the rings here is true of those of a
full shadow: only descriptors differ.

Each face of the relay is explored alone, with all that the other one could
do: it brings any number of elements at any look, and may wake the relay at any
time. Whatever both faces together can do is among that. Lost is a wake-up if
both parties of a face sleep, nothing is on its way to either, and one has
something for the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest

GUEST, RELAY, DEVICE = range(3)
FACES = ((GUEST, RELAY), (RELAY, DEVICE), (GUEST, RELAY, DEVICE))
"""The faces to explore: one face, the other, or both at once."""
SHARED = (
    # the guest's ring: indices, then what asks for notifications (a flag, or an event index)
    *("g.avail", "g.used", "g.call_me", "g.kick_me"),
    # the device's ring
    *("d.avail", "d.used", "d.call_me", "d.kick_me"),
    # eventfds
    *("kick", "call", "device.kick", "device.call"),
)
PASSED = -1
"""An event index that was passed: of those the model forgets which."""
AT = {name: at for at, name in enumerate(SHARED)}
Memory = tuple[int, ...]
Store = tuple[int, int]


class Party(NamedTuple):
    """Where a party is in its program, its own index of each direction, and what it has read last, or had before."""

    at: str
    avail: int = 0
    used: int = 0
    old: int = 0
    moved: int = 0


class World(NamedTuple):
    memory: Memory
    buffers: tuple[tuple[Store, ...], ...]
    parties: tuple[Party, ...]


@dataclass(frozen=True)
class Rules:
    """``event``: EVENT_IDX. ``buffered``: stores wait. The rest is what a model that is wrong leaves out."""

    num: int
    event: bool
    who: tuple[int, ...]
    buffered: bool = False
    second_look: bool = True
    fences: bool = True
    own_avail: bool = True
    """Whether the device has a separate avail ring, and so the relay's wish for notifications."""


class Step:
    """One step of a party: what it sees, and what the world is afterwards."""

    def __init__(self, rules: Rules, world: World, who: int) -> None:
        self.rules, self.world, self.who = rules, world, who
        self.mod = 2 * rules.num
        self.me = world.parties[who]

    def load(self, name: str) -> int:
        """Its own store if one waits."""
        for at, value in reversed(self.world.buffers[self.who]):
            if at == AT[name]:
                return value
        return self.world.memory[AT[name]]

    def then(self, at: str, *stores: tuple[str, int], **changes: int) -> World:
        memory, buffers = list(self.world.memory), list(self.world.buffers)
        for name, value in stores:
            if self.rules.buffered:
                buffers[self.who] = (*buffers[self.who], (AT[name], value))
            else:
                memory[AT[name]] = value
        return self._next(memory, buffers, at, changes)

    def signal(
        self, at: str, raised: tuple[str, ...] = (), cleared: tuple[str, ...] = (), **changes: int
    ) -> list[World]:
        """A system call: what waits is stored before."""
        if self.world.buffers[self.who]:
            return []
        memory = list(self.world.memory)
        for name in raised:
            memory[AT[name]] = 1
        for name in cleared:
            memory[AT[name]] = 0
        return [self._next(memory, list(self.world.buffers), at, changes)]

    def fence(self, at: str) -> list[World]:
        if self.rules.fences and self.world.buffers[self.who]:
            return []
        return [self.then(at)]

    def _next(self, memory: list[int], buffers: list[tuple[Store, ...]], at: str, changes: dict[str, int]) -> World:
        parties = list(self.world.parties)
        parties[self.who] = self.me._replace(at=at, **changes)
        return World(tuple(memory), tuple(buffers), tuple(parties))

    def wanted(self, name: str, new: int, old: int) -> bool:
        """Whether the other side has asked to be told of this."""
        wish = self.load(name)
        if wish == PASSED:
            return False
        if self.rules.event:
            return (new - wish - 1) % self.mod < (new - old) % self.mod
        return not wish

    def ask(self, name: str, at: int) -> tuple[tuple[str, int], ...]:
        return ((name, at if self.rules.event else 0),)

    def spare(self, name: str) -> tuple[tuple[str, int], ...]:
        return () if self.rules.event else ((name, 1),)


Programs = dict[str, Callable[[Step], list[World]]]


def index(s: Step, value: int) -> int:
    return value % s.mod


# -- a driver as virtio_net: polls without interrupts, asks for one, looks again, sleeps ------------------


def guest_publish(s: Step) -> list[World]:
    if (s.me.avail - s.me.used) % s.mod == s.rules.num:
        return [s.then("poll" if s.me.avail == s.me.old else "kick fence")]
    now = index(s, s.me.avail + 1)
    # one kick for several, or a look at what came in between
    return [
        s.then("kick fence", ("g.avail", now), avail=now),
        *([s.then("publish", ("g.avail", now), avail=now)] if s.me.avail == s.me.old else []),
    ]


def guest_kick(s: Step) -> list[World]:
    told = s.me.old
    if s.wanted("g.kick_me", s.me.avail, told):
        return s.signal("poll", ("kick",), old=s.me.avail)
    return [s.then("poll", old=s.me.avail)]


def guest_check(s: Step) -> list[World]:
    if s.load("g.used") != s.me.used:
        return [s.then("poll")]
    return [s.then("sleep")]


GUEST_PROGRAM: Programs = {
    "publish": guest_publish,
    "kick fence": lambda s: s.fence("kick"),
    "kick": guest_kick,
    "poll": lambda s: [s.then("consume", *s.spare("g.call_me"))],
    "consume": lambda s: [
        s.then("publish", used=index(s, s.me.used + 1)) if s.load("g.used") != s.me.used else s.then("ask")
    ],
    "ask": lambda s: [s.then("ask fence", *s.ask("g.call_me", s.me.used))],
    "ask fence": lambda s: s.fence("check"),
    "check": guest_check,
    # it may also begin to poll by itself
    "sleep": lambda s: [
        *(s.signal("poll", cleared=("call",)) if s.load("call") else []),
        s.then("poll"),
    ],
}


# -- the thread, as in svq_thread.c -----------------------------------------------------------------------------


def relay_return(s: Step) -> list[World]:
    if DEVICE in s.rules.who:
        return [_returned(s, s.load("d.used"))]
    lent = (s.me.avail - s.me.used) % s.mod
    return [_returned(s, index(s, s.me.used + more)) for more in range(lent + 1)]


def _returned(s: Step, used: int) -> World:
    if used == s.me.used:
        return s.then("forward")
    if GUEST in s.rules.who:
        return s.then("call fence", ("g.used", used), used=used, old=s.me.used, moved=s.me.moved | 1)
    return s.then("forward", used=used, old=used, moved=s.me.moved | 1)


def relay_call(s: Step) -> list[World]:
    if s.wanted("g.call_me", s.me.used, s.me.old):
        return s.signal("forward", ("call",), old=s.me.used)
    return [s.then("forward", old=s.me.used)]


def relay_forward(s: Step) -> list[World]:
    if GUEST in s.rules.who:
        return [_forwarded(s, s.load("g.avail"))]
    room = s.rules.num - (s.me.avail - s.me.used) % s.mod
    return [_forwarded(s, index(s, s.me.avail + more)) for more in range(room + 1)]


def _forwarded(s: Step, avail: int) -> World:
    if avail == s.me.avail:
        return s.then("round")
    if DEVICE in s.rules.who:
        return s.then("kick fence", ("d.avail", avail), avail=avail, old=s.me.avail, moved=s.me.moved | 1)
    return s.then("round", avail=avail, moved=s.me.moved | 1)


def relay_kick(s: Step) -> list[World]:
    if s.wanted("d.kick_me", s.me.avail, s.me.old):
        return s.signal("round", ("device.kick",), old=s.me.used)
    return [s.then("round", old=s.me.used)]


# `moved` has two bits: something was moved in this round, and 2 while it is the second look
def serve_round(s: Step) -> list[World]:
    second, moved = s.me.moved & 2, s.me.moved & 1
    if second:
        return [s.then("spare", moved=0) if moved else s.then("sleep", moved=0)]
    if moved:
        return [s.then("return", moved=0)]
    return [s.then("ask")]


RELAY_PROGRAM: Programs = {
    "spare": lambda s: [s.then("return", *s.spare("g.kick_me"), *s.spare("d.call_me"), moved=0)],
    "return": relay_return,
    "call fence": lambda s: s.fence("call"),
    "call": relay_call,
    "forward": relay_forward,
    "kick fence": lambda s: s.fence("kick"),
    "kick": relay_kick,
    "round": serve_round,
    "ask": lambda s: [s.then("ask device", *s.ask("g.kick_me", s.me.avail))],
    "ask device": lambda s: [s.then("ask fence", *s.ask("d.call_me", s.me.used))],
    "ask fence": lambda s: s.fence("look" if s.rules.second_look else "sleep"),
    "look": lambda s: [s.then("return", moved=2)],
    "sleep": lambda s: (
        s.signal("spare", cleared=("kick", "device.call"))
        if s.load("kick") or s.load("device.call") or len(s.rules.who) == 2
        else []
    ),
}


# -- a device: takes buffers, fills them when frames come, which may be at any time ------------------------


def device_fill(s: Step) -> list[World]:
    """A frame comes, or none does."""
    used = index(s, s.me.used + 1)
    return [s.then("call fence", ("d.used", used), used=used)] if s.me.used != s.me.avail else []


def device_call(s: Step) -> list[World]:
    wish = "d.call_me" if s.rules.own_avail else "g.call_me"
    if s.wanted(wish, s.me.used, index(s, s.me.used - 1)):
        return s.signal("take", ("device.call",))
    return [s.then("take")]


DEVICE_PROGRAM: Programs = {
    "take": lambda s: [
        s.then("take", avail=s.load("d.avail")) if s.load("d.avail") != s.me.avail else s.then("ask"),
        *device_fill(s),
    ],
    "call fence": lambda s: s.fence("call"),
    "call": device_call,
    "ask": lambda s: [s.then("ask fence", *s.ask("d.kick_me", s.me.avail))],
    "ask fence": lambda s: s.fence("check"),
    "check": lambda s: [s.then("take" if s.load("d.avail") != s.me.avail else "sleep")],
    "sleep": lambda s: [
        *(s.signal("wake", cleared=("device.kick",)) if s.load("device.kick") else []),
        *device_fill(s),
    ],
    "wake": lambda s: [s.then("take", *s.spare("d.kick_me"))],
}

PROGRAMS = (GUEST_PROGRAM, RELAY_PROGRAM, DEVICE_PROGRAM)


LOCAL = (
    {"kick fence", "ask fence"},
    {"call fence", "kick fence", "ask fence", "look", "round"},
    {"call fence", "ask fence"},
)
"""Steps that only their own thread sees: they need not be interleaved. Fences do not count where stores wait."""


def following(rules: Rules, world: World) -> list[World]:
    for who in rules.who:
        at = world.parties[who].at
        if at in LOCAL[who] and not (rules.buffered and at.endswith("fence")):
            return PROGRAMS[who][at](Step(rules, world, who))
    found = []
    for who in rules.who:
        found += PROGRAMS[who][world.parties[who].at](Step(rules, world, who))
        if world.buffers[who]:
            (name, value), *rest = world.buffers[who]
            memory, buffers = list(world.memory), list(world.buffers)
            memory[name], buffers[who] = value, tuple(rest)
            found.append(world._replace(memory=tuple(memory), buffers=tuple(buffers)))
    return found


def is_lost(rules: Rules, world: World) -> bool:
    guest, relay, device = world.parties
    m = {name: world.memory[at] for name, at in AT.items()}
    if relay.at != "sleep" or world.buffers[RELAY]:
        return False
    guest_sleeps = guest.at == "sleep" and not (world.buffers[GUEST] or m["kick"] or m["call"])
    device_sleeps = device.at == "sleep" and not (world.buffers[DEVICE] or m["device.kick"] or m["device.call"])
    guest_has_work = (guest.used, relay.avail) != (m["g.used"], m["g.avail"])
    device_has_work = (relay.used, device.avail) != (m["d.used"], m["d.avail"])
    at_guest = GUEST in rules.who and guest_sleeps and guest_has_work
    return at_guest or (DEVICE in rules.who and device_sleeps and device_has_work)


WISHES = [AT[name] for name in ("g.call_me", "g.kick_me", "d.call_me", "d.kick_me")]


def told(world: World, mod: int) -> tuple[int, int, int, int]:
    """From which index on each of the wishes is looked at the next time."""
    guest, relay, device = world.parties
    return (
        relay.old if relay.at.startswith("call") else relay.used,
        guest.old,
        (device.used - 1) % mod if device.at.startswith("call") else device.used,
        relay.old if relay.at.startswith("kick") else relay.avail,
    )


def turned(rules: Rules, world: World) -> World:
    """The same world with the first party's used index at 0, and without what nobody looks at any more."""
    by, mod = world.parties[rules.who[0]].used, 2 * rules.num
    absent = {"g.": GUEST not in rules.who, "d.": DEVICE not in rules.who, "ki": False, "ca": False, "de": False}
    since = dict(zip(WISHES, told(world, mod), strict=True))
    memory = list(world.memory)
    for name, at in AT.items():
        if absent[name[:2]]:
            memory[at] = 0
        elif at in since and rules.event:
            passed = memory[at] == PASSED or (memory[at] - since[at]) % mod > rules.num
            memory[at] = PASSED if passed else (memory[at] - by) % mod
        elif name in ("g.avail", "g.used", "d.avail", "d.used"):
            memory[at] = (memory[at] - by) % mod
    turn = set(since) if rules.event else set()
    turn |= {AT["g.avail"], AT["g.used"], AT["d.avail"], AT["d.used"]}
    buffers = tuple(tuple((at, (v - by) % mod if at in turn else v) for at, v in buffer) for buffer in world.buffers)
    parties = list(world.parties)
    for who in rules.who:
        me = parties[who]
        parties[who] = me._replace(avail=(me.avail - by) % mod, used=(me.used - by) % mod, old=(me.old - by) % mod)
    return World(tuple(memory), buffers, tuple(parties))


def explore(rules: Rules) -> tuple[int, bool]:
    """How many states can be reached, and whether something is lost in one of them, which ends the search."""
    start = World((0,) * len(SHARED), ((), (), ()), (Party("publish"), Party("spare"), Party("take")))
    seen, left = {start}, [start]
    while left:
        world = left.pop()
        if is_lost(rules, world):
            return len(seen), True
        for each in following(rules, world):
            turn = turned(rules, each)
            if turn not in seen:
                seen.add(turn)
                left.append(turn)
    return len(seen), False


GUEST_FACE, DEVICE_FACE, BOTH = FACES
EVERYTHING = os.environ.get("PYVHOSTVDPA_MODEL", "") == "all"
"""Also what takes minutes: rings of 4 with stores that wait, and all that a device of a ring of 4 can do."""
QUICK = [
    *(
        Rules(num, event, GUEST_FACE, buffered)
        for num in (1, 2)
        for event in (False, True)
        for buffered in (False, True)
    ),
    *(Rules(num, event, DEVICE_FACE) for num in (1, 2) for event in (False, True)),
    *(Rules(1, event, DEVICE_FACE, buffered=True) for event in (False, True)),
    Rules(4, False, GUEST_FACE),
]
LONG = [
    *(Rules(2, event, DEVICE_FACE, buffered=True) for event in (False, True)),
    Rules(4, True, GUEST_FACE),
    *(Rules(4, event, DEVICE_FACE) for event in (False, True)),
    *(Rules(4, event, face, buffered=True) for event in (False, True) for face in (GUEST_FACE, DEVICE_FACE)),
]


@pytest.mark.parametrize("rules", QUICK + LONG if EVERYTHING else QUICK, ids=str)
def test_nobody_sleeps_on_work_in_any_interleaving(rules: Rules) -> None:
    states, lost = explore(rules)
    print(f"{rules}: {states} states")
    assert not lost
    assert states > 500


WRONG = {
    "no second look at the driver's ring": Rules(2, False, GUEST_FACE, second_look=False),
    "no second look at the driver's ring, EVENT_IDX": Rules(2, True, GUEST_FACE, second_look=False),
    "no second look at the device's ring": Rules(2, False, DEVICE_FACE, second_look=False),
    "no second look at the device's ring, EVENT_IDX": Rules(2, True, DEVICE_FACE, second_look=False),
    "no fences at the driver's ring": Rules(1, False, GUEST_FACE, buffered=True, fences=False),
    "no fences at the driver's ring, EVENT_IDX": Rules(1, True, GUEST_FACE, buffered=True, fences=False),
    "no fences at the device's ring": Rules(1, False, DEVICE_FACE, buffered=True, fences=False),
    "no fences at the device's ring, EVENT_IDX": Rules(1, True, DEVICE_FACE, buffered=True, fences=False),
    "the device obeys the driver's avail ring": Rules(2, False, BOTH, own_avail=False),
    "the device obeys the driver's avail ring, EVENT_IDX": Rules(2, True, BOTH, own_avail=False),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_model_that_is_wrong_is_found_out(what: str) -> None:
    """The last two are the used ring relayed alone: why the device has a separate avail ring."""
    _, lost = explore(WRONG[what])
    assert lost
