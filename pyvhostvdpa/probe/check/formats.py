# SPDX-License-Identifier: MIT
"""What came of a check, for programs: JSON, TAP 14, JUnit's XML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from .engine import Check
from .rule import Result, Verdict

SCHEMA = "pyvhostvdpa/check/1"
_NOT_TRIED = {
    Verdict.NOT_OFFERED: "not offered",
    Verdict.UNKNOWN: "cannot be determined here",
}


def to_dict(found: Check) -> dict[str, Any]:
    """Return a check for JSON."""
    return {
        "schema": SCHEMA,
        "device": found.facts.to_dict(),
        "seconds": round(found.seconds, 3),
        "counts": {verdict.value: found.count(verdict) for verdict in Verdict},
        "not_tried": found.left,
        "kernel_log": found.log_unread or "read",
        "address_left": found.address_left or None,
        "rules": [result.to_dict() for result in found.results],
    }


def tap(found: Check) -> str:
    """Return a check in the Test Anything Protocol, version 14, as the kernel's selftests print it (KTAP)."""
    lines = ["TAP version 14", f"1..{len(found.results) + found.left}"]
    for number, result in enumerate(found.results, 1):
        ok = "ok" if result.verdict in (Verdict.PASS, *_NOT_TRIED) else "not ok"
        lines.append(f"{ok} {number} - {result.rule.id}{_directive(result)}")
        if result.verdict in (Verdict.FAIL, Verdict.KNOWN):
            lines += [
                "  ---",
                f"  message: {_quoted(result.detail)}",
                f"  source: {_quoted(result.rule.source)}",
                "  ...",
            ]
    if found.left:
        lines.append("Bail out! interrupted")
    return "\n".join(lines)


def _directive(result: Result) -> str:
    if result.verdict in _NOT_TRIED:
        return f" # SKIP {_NOT_TRIED[result.verdict]}: {_line(result.detail)}"
    return f" # TODO known: {_line(result.fault)}" if result.verdict is Verdict.KNOWN else ""


def _line(text: str) -> str:
    return " ".join(text.split()).replace("#", "\\#")


def _quoted(text: str) -> str:
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def junit(found: Check) -> str:
    """Return a check as JUnit's XML, one suite a group."""
    suites = "\n".join(_suite(name, found) for name in dict.fromkeys(r.rule.group for r in found.results))
    head = f"tests={_n(len(found.results))} failures={_n(len(found.failed))} time={_n(round(found.seconds, 3))}"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="vhost-vdpa check" {head}>\n{suites}\n</testsuites>'
    )


def _n(value: float) -> str:
    return quoteattr(str(value))


def _suite(name: str, found: Check) -> str:
    mine = [result for result in found.results if result.rule.group == name]
    failures = sum(result.verdict is Verdict.FAIL for result in mine)
    skipped = sum(result.verdict not in (Verdict.PASS, Verdict.FAIL) for result in mine)
    head = f"name={quoteattr(name)} tests={_n(len(mine))} failures={_n(failures)} skipped={_n(skipped)}"
    return "\n".join([f"  <testsuite {head}>", *_cases(mine), "  </testsuite>"])


def _cases(results: Iterable[Result]) -> Iterable[str]:
    for result in results:
        head = f"classname={quoteattr(result.rule.group)} name={quoteattr(result.rule.id)}"
        head += f" time={_n(round(result.seconds, 3))}"
        text = _clean(result.detail)
        if result.verdict is Verdict.PASS:
            yield f"    <testcase {head}/>"
        elif result.verdict is Verdict.FAIL:
            body = escape(f"{result.rule.sentence}\n{result.rule.source}\n{text}")
            yield f"    <testcase {head}><failure message={quoteattr(text)}>{body}</failure></testcase>"
        else:
            yield f"    <testcase {head}><skipped message={quoteattr(f'{result.verdict.value}: {text}')}/></testcase>"


def _clean(text: str) -> str:
    """Return text without what XML 1.0 cannot hold."""
    return "".join(c for c in text if c in "\n\t" or ord(c) >= 32)
