"""One report from several parts of a test run: checks without tests, and pytest's JUnit files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

SLOWEST = 10
SHOWN_LINES = 12


@dataclass(frozen=True)
class Case:
    """One test and how it ended: passed, failed or skipped."""

    name: str
    result: str
    seconds: float = 0.0
    message: str = ""


@dataclass
class Part:
    """One part of a run: where it ran, how long it took, what came out."""

    name: str
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)

    def count(self, result: str) -> int:
        """Return how many cases ended so."""
        return sum(case.result == result for case in self.cases)


def read_junit(path: Path) -> list[Case]:
    """Read pytest's JUnit file."""
    cases = []
    for element in ElementTree.parse(path).iter("testcase"):
        result, message = "passed", ""
        for child in element:
            if child.tag in ("failure", "error"):
                result, message = "failed", child.text or child.get("message") or ""
                break
            if child.tag == "skipped":
                result, message = "skipped", child.get("message", "")
        name = f"{element.get('classname', '')}::{element.get('name', '')}"
        cases.append(Case(name, result, float(element.get("time", "0")), message))
    return cases


def render(parts: Sequence[Part]) -> str:
    """Return the report; its last line is the sum."""
    width = max((len(part.name) for part in parts), default=0)
    lines = ["", f"{'part':<{width}}      wall   passed   failed  skipped"]
    for part in parts:
        counts = "".join(f"{part.count(result):>9}" for result in ("passed", "failed", "skipped"))
        lines.append(f"{part.name:<{width}}{part.seconds:>8.1f} s{counts}")
    for part in parts:
        for case in part.cases:
            if case.result != "passed":
                lines += ["", f"{case.result.upper()} ({part.name}) {case.name}"]
                lines += [f"    {line}" for line in case.message.strip().splitlines()[-SHOWN_LINES:]]
    timed = sorted((case for part in parts for case in part.cases if case.seconds > 0), key=lambda case: -case.seconds)
    if timed:
        lines += ["", "slowest tests"]
        lines += [f"{case.seconds:>9.2f} s  {case.name}" for case in timed[:SLOWEST]]
    total = [sum(part.count(result) for part in parts) for result in ("passed", "failed", "skipped")]
    return "\n".join([*lines, "", f"{total[0]} passed, {total[1]} failed, {total[2]} skipped"])


def clean(parts: Sequence[Part]) -> bool:
    """Return whether the run is good: something ran, nothing failed, nothing was skipped."""
    return any(part.cases for part in parts) and all(case.result == "passed" for part in parts for case in part.cases)
