# SPDX-License-Identifier: MIT
"""What a rule of the conformance test is, and what can come of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import VhostVdpaError
from ...base.uapi import VIRTIO_ID_NET

VIRTIO_ID_BLOCK = 2
ANY, NET, BLOCK = None, VIRTIO_ID_NET, VIRTIO_ID_BLOCK
"""For which kind of device a rule is: its virtio id, None for all of them."""
DEADLINE_S = 15.0
"""Seconds that a rule may take unless it says otherwise. On a device that keeps to it, it takes a fraction of one."""


class Verdict(enum.Enum):
    """What came of a rule.

    ``KNOWN`` is a fail that the table of known driver faults has, with its
    source (:mod:`.known`). ``NOT_OFFERED``: the device lacks what the rule is
    about. ``UNKNOWN``: it cannot be determined here, and why.
    """

    PASS = "pass"
    FAIL = "fail"
    KNOWN = "known"
    NOT_OFFERED = "not_offered"
    UNKNOWN = "unknown"


class Broken(VhostVdpaError):
    """The device did not keep to the rule; the text says what was seen."""


class NotOffered(VhostVdpaError):
    """The device does not offer what the rule is about."""


class CannotTell(VhostVdpaError):
    """Whether the device keeps to the rule cannot be determined here."""


Act = Callable[[Any], str]
"""Tries the rule, given a :class:`~pyvhostvdpa.probe.check.bench.Bench`.

Returns what was seen where the rule is kept; raises one of the three above otherwise.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its ``id`` (``group.name``), what it demands in one sentence, and its source.

    ``source`` names the kernel file and function, or the section of the virtio
    specification. ``device`` is the virtio id that it is for, None for every
    device; ``deadline`` is in seconds.
    """

    id: str
    sentence: str
    source: str
    act: Act
    device: int | None = ANY
    deadline: float = DEADLINE_S

    @property
    def group(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]


@dataclass(slots=True)
class Group:
    """The rules of one file: ``name`` is the first part of their ids, ``title`` is for people."""

    name: str
    title: str
    rules: list[Rule] = field(default_factory=list)

    def rule(
        self, name: str, sentence: str, source: str, device: int | None = ANY, deadline: float = DEADLINE_S
    ) -> Callable[[Act], Act]:
        """Register the function below as the rule ``name`` of this group; see :class:`Rule`."""

        def register(act: Act) -> Act:
            self.rules.append(Rule(f"{self.name}.{name}", sentence, source, act, device, deadline))
            return act

        return register


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one rule: the ``verdict``, what was seen, and how it was tried.

    ``seconds`` is its duration. ``calls`` are the calls that were made on the
    device, with what they returned. ``fault`` is the source of a known fault.
    """

    rule: Rule
    verdict: Verdict
    detail: str
    seconds: float = 0.0
    calls: Sequence[str] = ()
    fault: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "id": self.rule.id,
            "group": self.rule.group,
            "verdict": self.verdict.value,
            "detail": self.detail,
            "sentence": self.rule.sentence,
            "source": self.rule.source,
            "tried": list(self.calls),
            "known_fault": self.fault or None,
            "seconds": round(self.seconds, 3),
        }


def demand(kept: object, seen: str) -> None:
    """Raise :class:`Broken` with the observation ``seen`` unless the rule is ``kept``."""
    if not kept:
        raise Broken(seen)


def offered(there: object, lacking: str) -> None:
    """Raise :class:`NotOffered` unless what the rule needs is ``there``."""
    if not there:
        raise NotOffered(lacking)


def select(rules: Sequence[Rule], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Rule]:
    """Return the rules that ``only`` names (all without), without those that ``skip`` names.

    A name is a rule's id, a group, or a pattern with ``*``. Raises
    :class:`~pyvhostvdpa.VhostVdpaError` for one that means no rule.
    """
    chosen = {rule.id for name in only for rule in _named(rules, name)} if only else {rule.id for rule in rules}
    left_out = {rule.id for name in skip for rule in _named(rules, name)}
    return [rule for rule in rules if rule.id in chosen and rule.id not in left_out]


def _named(rules: Sequence[Rule], name: str) -> Iterator[Rule]:
    from fnmatch import fnmatchcase  # noqa: PLC0415

    found = [rule for rule in rules if name in (rule.id, rule.group) or fnmatchcase(rule.id, name)]
    if not found:
        raise VhostVdpaError(
            f"no rule is called {name!r}", hint="vhost-vdpa check --list; DEV stands in front of --only and --skip"
        )
    yield from found
