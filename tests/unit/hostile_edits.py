"""Inputs of the hostile source: what their bytes mean, random ones, and how one becomes another.

An input is a head of one byte and edits of a fixed size, so that whatever
libFuzzer does to it whole edits stay whole. Most of what is drawn here is
what a hostile source would send: a buffer right at the end of memory, a ring
as large as can be, indices of a driver that has run for long.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

MAX_EDITS = 16
BYTES = 12
MAX_INPUT = 1 + MAX_EDITS * BYTES

EDIT, STRETCH, ADVANCE, PATCH, WRITE, CLOCK = 0x00, 0x90, 0xA0, 0xC0, 0xD0, 0xF0
"""Each from here on up to the next: a field, several addresses and sizes of a part, a ring's indices, a byte of a
section, a word of memory, GO's clock."""
_KINDS = (*[EDIT] * 7, *[ADVANCE] * 2, PATCH, WRITE, CLOCK)
_FRESH = 0.5
"""Share of inputs drawn from scratch; the rest come from earlier inputs, which grow and are refused for some edit."""
INCOHERENT, FROM_OUTLINE, OF_OUTLINE = 2, 4, 12
"""Flags of an input: memory does not say of rings what the state says; the destination has stood by, from an honest
outline of the guest; from one that has the edits, and the state has none."""
_COUNTS = (1, 2, 3, 3, 4, 4, 5, 6, 8, 12)
_VALUES = (0, 1, 2, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 1 << 16, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)


@dataclass(frozen=True)
class Edit:
    """One edit: its kind, which part of the state and which field of it, how to choose a value, and a number for it."""

    kind: int
    part: int
    field: int
    choice: int
    value: int

    def encode(self) -> bytes:
        return bytes([self.kind, self.part, self.field, self.choice]) + self.value.to_bytes(8, "little")


def head_of(data: bytes) -> int:
    """Return which world an input is for (1), and the flags."""
    return data[0] if data else 0


def edits_of(data: bytes) -> Iterator[Edit]:
    """Yield the edits of an input; zeros follow its end."""
    for at in range(1, min(len(data), MAX_INPUT), BYTES):
        record = data[at : at + BYTES].ljust(BYTES, b"\0")
        yield Edit(*record[:4], int.from_bytes(record[4:], "little"))


def random_input(chance: random.Random) -> bytes:
    """Return an input of a few edits, most of them of one part; half of them take that part to its limits."""
    part = chance.randrange(256)
    if chance.random() < 0.5:
        edits = [_stretch(chance, part), Edit(ADVANCE, part, chance.randrange(256), 0, chance.getrandbits(16))]
        edits += [random_edit(chance, part) for _ in range(chance.randrange(3))]
    else:
        edits = [random_edit(chance, part) for _ in range(chance.choice(_COUNTS))]
    return bytes([_head(chance)]) + b"".join(edit.encode() for edit in edits)


def _head(chance: random.Random) -> int:
    world, incoherent = chance.choice((0, 1, 1, 1, 1)), chance.choice((0, 0, 0, INCOHERENT))
    return world | incoherent | chance.choice((0, 0, FROM_OUTLINE, OF_OUTLINE))


def _stretch(chance: random.Random, part: int) -> Edit:
    return Edit(
        STRETCH, part, chance.randrange(256), chance.randrange(256), chance.getrandbits(64) & chance.getrandbits(64)
    )


def random_edit(chance: random.Random, part: int) -> Edit:
    """Return an edit, as a rule of this part."""
    kind = chance.choice(_KINDS)
    if chance.random() < 0.2:
        part = chance.randrange(256)
    value = chance.choice(_VALUES) if chance.random() < 0.3 else chance.getrandbits(chance.choice((8, 10, 16, 24, 64)))
    return Edit(kind, part, chance.randrange(256), chance.randrange(256), value)


def mutated(data: bytes, seed: int) -> bytes:
    """Return an input that differs by one or two edits: added, removed, drawn again, or with another value."""
    chance = random.Random(seed)
    if chance.random() < _FRESH:
        return random_input(chance)
    head, edits = head_of(data), list(edits_of(data))
    for _ in range(chance.choice((1, 1, 2))):
        way = chance.random()
        part = chance.choice(edits).part if edits else chance.randrange(256)
        at = chance.randrange(len(edits) + 1)
        if way < 0.5 or not edits:
            edits.insert(at, random_edit(chance, part))
        elif way < 0.65:
            edits.pop(at - 1)
        elif way < 0.95:
            edits[at - 1] = _varied(edits[at - 1], random_edit(chance, part), chance)
        else:
            head = _head(chance)
    return bytes([head]) + b"".join(edit.encode() for edit in edits[-MAX_EDITS:])


def _varied(old: Edit, drawn: Edit, chance: random.Random) -> Edit:
    """Return an edit with one thing of another."""
    return chance.choice(
        (
            Edit(old.kind, old.part, old.field, old.choice, drawn.value),
            Edit(old.kind, old.part, old.field, drawn.choice, drawn.value),
            Edit(old.kind, old.part, drawn.field, drawn.choice, drawn.value),
        )
    )


def crossed(one: bytes, other: bytes, seed: int) -> bytes:
    """Return an input with edits of two, in the order in which they had them."""
    chance = random.Random(seed)
    kept = [edit for data in (one, other) for edit in edits_of(data) if chance.random() < 0.7]
    return bytes([head_of(one)]) + b"".join(edit.encode() for edit in kept[-MAX_EDITS:])
