# SPDX-License-Identifier: MIT
"""``vhost-vdpa check``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.errors import VhostVdpaError
from ..chardev.door import check_path
from ..host import mgmt
from ..host.parents import check_served
from ..probe.check.engine import Check, Interrupted, check
from ..probe.check.formats import junit, tap, to_dict
from ..probe.check.rule import ANY, BLOCK, NET, Result, Rule, Verdict, select
from ..probe.check.rules import all_groups, catalogue
from ..probe.check.script import file_name, script
from .commands import columns
from .failure import INTERRUPTED, report
from .options import DEVICE, add_json
from .table import table, wrap

DESCRIPTION = """\
Try on a device, rule by rule, what the kernel's interface and the virtio specification demand of a vDPA parent. The
device is opened, reset and driven for each rule; frames of EtherType 0x88b5 leave it, and rings, buffers and maps are
also made wrong on purpose. Nothing is written to a disk without --write. A device in use is refused. Give it a machine
that may crash if the driver is not known to be good. 'vhost-vdpa help check' explains the output."""
EPILOG = """\
examples:
  vhost-vdpa check vdpa0                          every rule for this kind of device
  vhost-vdpa check vdpa0 --only suspend iotlb     two groups
  vhost-vdpa check vdpa0 --skip 'robust.*' --tap  without the bad descriptors
  vhost-vdpa check vdpa0 --script failed/         a script for each rule that failed
  vhost-vdpa check --list                         all rules, with their sources

exit status: 0 no rule failed, or only by a fault that is known of this driver; 1 a rule failed, or an error;
2 wrong usage; 130 interrupted, with what was found until then"""
_AFTER_S = 1.0
"""Seconds without a word; after them, what is tried is shown."""
_EVERY_S = 10.0
"""Seconds between two lines of progress where standard error is not a terminal."""
_MARKS = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "FAIL",
    Verdict.KNOWN: "known",
    Verdict.NOT_OFFERED: "not offered",
    Verdict.UNKNOWN: "unknown",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("device", metavar="DEV", nargs="?", help=f"{DEVICE} (default: the only device)")
    parser.add_argument("--only", metavar="ID", nargs="+", default=[], help="rules, groups, or patterns with *")
    parser.add_argument("--skip", metavar="ID", nargs="+", default=[], help="the same, to be left out")
    parser.add_argument("--list", action="store_true", help="print the rules and try none")
    form = parser.add_mutually_exclusive_group()
    add_json(form, "print JSON, schema pyvhostvdpa/check/1")
    form.add_argument("--tap", action="store_true", help="print TAP 14, as the kernel's selftests do")
    form.add_argument("--junit", action="store_true", help="print JUnit's XML")
    parser.add_argument("--script", metavar="DIR", help="write a script that shows it for each rule that failed")
    parser.add_argument("--write", action="store_true", help="allow writing to a disk; put back, unless interrupted")


def run(arguments: argparse.Namespace) -> int:
    """Check and print."""
    rules = select(catalogue(), arguments.only, arguments.skip)
    if arguments.list:
        if arguments.tap or arguments.junit:
            arguments.parser.error("--list tries no rule, so it has no results for --tap or --junit; it has --json")
        print(json.dumps(_rules_json(rules), indent=2) if arguments.json else _list(rules))
        return 0
    path = mgmt.chardev_of(arguments.device)
    check_path(path)
    check_served(path)
    # before two minutes of work, not after them
    folder = _folder(arguments.script) if arguments.script else None
    found = _tried(path, rules, arguments.write)
    # before standard output, whose reader may have gone
    lost = _write_scripts(found, folder, arguments.write) if folder else None
    if arguments.json:
        print(json.dumps(to_dict(found), indent=2))
    elif arguments.tap:
        print(tap(found))
    elif arguments.junit:
        print(junit(found))
    else:
        print(_text(found))
    if lost:
        raise lost
    if folder:
        report(f"vhost-vdpa: {len(found.failed)} scripts in {folder}")
    if found.left:
        report("vhost-vdpa: interrupted; the device was reset and closed")
        return INTERRUPTED
    return 1 if found.failed else 0


def _tried(path: str, rules: Sequence[Rule], may_write: bool) -> Check:
    """Check; what was found until Ctrl-C, unless that is nothing."""
    try:
        with _RuleProgress() as progress:
            return check(path, rules, progress, may_write)
    except Interrupted as e:
        if not e.found.results:
            raise
        return e.found


def _folder(name: str) -> Path:
    """Make the folder for scripts; :class:`~pyvhostvdpa.VhostVdpaError` if nothing can be written there."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VhostVdpaError(f"--script {folder}: {e.strerror}") from e
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VhostVdpaError(f"--script {folder}: no permission to write there")
    return folder


class _RuleProgress:
    """Prints the current rule, on standard error, once it has taken a while."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._told = self._begin + _AFTER_S - _EVERY_S
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def __call__(self, number: int, count: int, rule: Rule) -> None:
        now = time.monotonic()
        if self._terminal and now - self._begin > _AFTER_S:
            sys.stderr.write(f"\r\033[K{number} of {count}  {rule.id}")
            sys.stderr.flush()
            self._shown = True
        elif not self._terminal and now - self._told > _EVERY_S:
            self._told = now
            report(f"vhost-vdpa: rule {number} of {count}, {rule.id}")

    def __enter__(self) -> _RuleProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def _text(found: Check) -> str:
    parts = [_answer(found)]
    parts += [_failure(result, found) for result in found.failed]
    parts += [f"Known faults of {found.facts.module}:\n{known}" for known in [_known(found)] if known]
    parts.append(_by_group(found))
    if unknown := _listed(found, Verdict.UNKNOWN):
        parts.append(f"Cannot be determined here:\n{unknown}")
    if found.log_unread:
        parts.append(
            wrap(f"The kernel's log was not read ({found.log_unread}): a WARN would not be seen.", "", "", columns())
        )
    if found.address_left:
        parts.append(wrap(f"The MAC address was not put back: {found.address_left}.", "", "", columns()))
    parts.append(_next(found))
    return "\n\n".join(parts)


def _answer(found: Check) -> str:
    facts, total = found.facts, len(found.results)
    others = [
        (found.count(Verdict.FAIL), "FAIL"),
        (found.count(Verdict.KNOWN), "known to fail"),
        (found.count(Verdict.NOT_OFFERED), "not offered"),
        (found.count(Verdict.UNKNOWN), "unknown"),
    ]
    rest = "".join(f", {number} {what}" for number, what in others if number)
    return wrap(
        f"{facts.name} ({facts.module or 'driver unknown'}): {found.count(Verdict.PASS)} of {total} rules pass{rest} "
        f"({found.seconds:.0f} s).{f' Interrupted: {found.left} rules were not tried.' if found.left else ''}",
        "", "", columns(),
    )  # fmt: skip


def _failure(result: Result, found: Check) -> str:
    width = columns()
    rows = [
        wrap(result.rule.sentence + ".", f"FAIL  {result.rule.id}  ", "      ", width),
        wrap(result.detail, "      seen: ", "        ", width),
        wrap(result.rule.source, "      source: ", "        ", width),
        wrap(f"vhost-vdpa check {found.facts.name} --only {result.rule.id}", "      again: ", "        ", width),
    ]
    return "\n".join(rows)


def _known(found: Check) -> str:
    lines = []
    for result in found.results:
        if result.verdict is Verdict.KNOWN:
            lines.append(wrap(f"{result.detail} ({result.fault})", f"  {result.rule.id}  ", "    ", columns()))
    return "\n".join(lines)


def _listed(found: Check, verdict: Verdict) -> str:
    return "\n".join(
        wrap(result.detail, f"  {result.rule.id}  ", "    ", columns())
        for result in found.results
        if result.verdict is verdict
    )


def _by_group(found: Check) -> str:
    rows = []
    for group in all_groups():
        mine = [result for result in found.results if result.rule.group == group.name]
        if mine:
            counts = [sum(result.verdict is verdict for result in mine) for verdict in Verdict]
            rows.append([group.name, *(str(count or "-") for count in counts)])
    return table(["GROUP", *(_MARKS[verdict].upper() for verdict in Verdict)], rows)


def _next(found: Check) -> str:
    if found.failed:
        return f"next: vhost-vdpa check {found.facts.name} --script failed/ (a script for each, to send with a report)"
    return f"next: vhost-vdpa probe {found.facts.name} --verify, or vhost-vdpa help check (how to read this)"


def _list(rules: Sequence[Rule]) -> str:
    lines = []
    titles = {group.name: group.title for group in all_groups()}
    for name in dict.fromkeys(rule.group for rule in rules):
        lines.append(f"{name}: {titles[name]}")
        for rule in (rule for rule in rules if rule.group == name):
            lines.append(wrap(f"{rule.sentence}.", f"  {rule.id}  ", "    ", columns()))
            lines.append(wrap(rule.source, "    source: ", "      ", columns()))
    return "\n".join(
        [*lines, f"for a network device {_count(rules, NET)}, for a disk {_count(rules, BLOCK)}; {len(rules)} rules"]
    )


def _count(rules: Sequence[Rule], device: int) -> int:
    return sum(rule.device in (ANY, device) for rule in rules)


def _rules_json(rules: Sequence[Rule]) -> dict[str, Any]:
    return {
        "schema": "pyvhostvdpa/check/rules/1",
        "rules": [
            {
                "id": rule.id,
                "group": rule.group,
                "sentence": rule.sentence,
                "source": rule.source,
                "virtio_id": rule.device,
                "deadline": rule.deadline,
            }
            for rule in rules
        ],
    }


def _write_scripts(found: Check, folder: Path, may_write: bool) -> VhostVdpaError | None:
    """Write a script for each rule that failed; the error if that did not work: the result is printed first."""
    facts = found.facts
    try:
        for result in found.failed:
            text = script(result, facts.path, f"{facts.name} ({facts.module or 'driver unknown'})", may_write)
            (folder / file_name(result)).write_text(text)
    except OSError as e:
        return VhostVdpaError(f"--script {folder}: {e.strerror}: not every script was written")
    return None
