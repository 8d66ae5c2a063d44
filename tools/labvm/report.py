"""What a move comes to: rows for JSON, a timeline, a table, and a sentence."""

from collections.abc import Sequence
from typing import Any

from labvm import calls
from labvm.backends import SERVE
from labvm.move import Outcome

SCHEMA = "pyvhostvdpa/vm/1"
WANTED = {"switch_ms": ("switch", 200), "stop_to_run_ms": ("stop to run", 100)}
"""At most this part of what QEMU takes by itself is what `vhost-vdpa serve` is to take."""
SHOWN = 5


def _ms(span_ns: float | None) -> float | None:
    return None if span_ns is None else round(span_ns / 1e6, 3)


def standstill(outcome: Outcome, begin: int, end: int) -> float | None:
    """Return the longest gap in the guest's frames, as they arrived at the peer, that overlaps a span; ms.

    Unknown where frames are looped back: the guest's own clock stops with it.
    """
    if not outcome.peer:
        return None
    gaps = [*outcome.peer["udp"]["gaps"], *outcome.peer.get("asked", [])]
    overlapping = [ns for at, ns in gaps if at < end and at + ns > begin]
    return _ms(max(overlapping, default=0)) if overlapping else None


def _still(outcome: Outcome, value: float | None) -> str:
    """Return a standstill in words; one that is not among the longest gaps is no longer than the shortest of them."""
    if value is None and outcome.peer and outcome.peer["udp"]["gaps"]:
        return f"at most {_figure(_ms(min(ns for _, ns in outcome.peer['udp']['gaps'])))}"
    return _figure(value)


def device_lost(outcome: Outcome) -> int | None:
    """Return frames that the guest gave to its driver and no device sent; negative if some were sent twice.

    Unknown for a device that does not count.
    """
    if not outcome.counters[0]:
        return None
    sent = sum(counters.get("vq1.packets", 0) for counters in outcome.counters[:2])
    return int(outcome.guest["frames"]["tx"]) - sent


def parts(outcome: Outcome, begin: int, end: int) -> list[dict[str, Any]]:
    """Return what a span went into by kind of call, the longest first; the rest of it is not in a call on a device."""
    found: dict[tuple[str, str], list[int]] = {}
    for side, made in zip(("source", "destination"), outcome.logs, strict=True):
        for call in made:
            took = min(call.end_ns, end) - max(call.begin_ns, begin)
            if took > 0:
                found.setdefault((side, call.name), []).append(took)
    told = [
        {"device": side, "call": name, "count": len(took), "ms": _ms(sum(took))} for (side, name), took in found.items()
    ]
    return sorted(told, key=lambda part: -part["ms"])


def row(outcome: Outcome) -> dict[str, Any]:
    """Return the row of `pyvhostvdpa/vm/1`."""
    begin, end = outcome.stop_to_run
    made = sorted([*outcome.logs[0], *outcome.logs[1]], key=lambda call: call.begin_ns)
    at_devices = calls.busy_ns(made, begin, end)
    ours = calls.busy_ns([*made, *outcome.work], begin, end) - at_devices
    udp, tcp = outcome.guest["udp"], outcome.guest["tcp"]
    # the far end's account of the guest's frames; a guest whose frames come back to it keeps its own
    far = outcome.peer["udp"] if outcome.peer else udp
    switch = outcome.figures.switch
    return {
        "vmm": outcome.plan.vmm,
        "backend": outcome.plan.backend,
        "profile": outcome.plan.costs.profile,
        "switch_ms": outcome.figures.dt1_ms,
        "stop_to_run_ms": _ms(end - begin),
        "vmm_ms": _ms(end - begin - at_devices - ours),
        "serve_ms": _ms(ours) if outcome.work else None,
        "device_ms": _ms(at_devices),
        "calls": parts(outcome, begin, end),
        "dt2_ms": outcome.figures.dt2_ms,
        "start_ms": outcome.figures.start_ms,
        "vmm_downtime_ms": outcome.qemu_downtime_ms,
        "guest": {
            "longest_gap_ms": _ms(far["longest_gap_ns"]) if outcome.peer else None,
            "switch_gap_ms": standstill(outcome, *switch) if switch else None,
            "move_gap_ms": standstill(outcome, begin, end),
            "sent": udp["sent"],
            "lost": udp["sent"] - (far["received"] - far["duplicated"]) - outcome.lost_before,
            "duplicated": far["duplicated"],
            "reordered": far["reordered"],
            "corrupted": far["corrupted"],
            "answers_lost": udp["lost"] - outcome.lost_before,
            "tcp": {"sent": tcp["sent"], "echoed": tcp["echoed"], "wrong": tcp["wrong"], "broken": tcp["broken"]},
            "memory": {"verified": outcome.guest["memory"]["verified"], "wrong": outcome.guest["memory"]["wrong"]},
        },
        "device": {"lost": device_lost(outcome), "sent": [c.get("vq1.packets", 0) for c in outcome.counters[:2]]},
    }


def faults(row: dict[str, Any]) -> list[str]:
    """Return what must not be in a row: a guest that did not arrive whole."""
    guest = row["guest"]
    found = []
    if guest["memory"]["wrong"] or not guest["memory"]["verified"]:
        found.append(f"memory: {guest['memory']['wrong']} pages of {guest['memory']['verified']} wrong")
    if guest["tcp"]["broken"] or guest["tcp"]["wrong"] or (guest["tcp"]["sent"] and not guest["tcp"]["echoed"]):
        found.append(f"TCP: {guest['tcp']}")
    if guest["corrupted"] or guest["duplicated"]:
        found.append(f"frames: {guest['corrupted']} corrupted, {guest['duplicated']} twice")
    lost = row["device"]["lost"] or 0
    if lost > 0:
        found.append(f"{lost} frames of the guest were never sent")
    if lost < 0:
        found.append(f"the devices sent {-lost} more frames than the guest")
    return found


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}"


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def render(outcome: Outcome) -> str:
    """Return timeline, table and sentence."""
    told = row(outcome)
    begin = outcome.timeline[0][0]
    lines = [f"{(at - begin) / 1e9:9.3f} s  {text}" for at, text in outcome.timeline]
    guest = told["guest"]
    lines += [
        "",
        f"QEMU {told['vmm']}, {told['backend']}, costs {told['profile']}",
        f"  switch (DT1)             {_figure(told['switch_ms']):>12} ms   longest gap "
        f"{_still(outcome, guest['switch_gap_ms'])} ms",
        f"  stop to run              {_figure(told['stop_to_run_ms']):>12} ms   longest gap "
        f"{_still(outcome, guest['move_gap_ms'])} ms",
        f"    of it QEMU's own share {_figure(told['vmm_ms']):>12} ms",
        *([f"    serve's own share      {_figure(told['serve_ms']):>12} ms"] if outcome.work else []),
        f"    calls on the devices   {_figure(told['device_ms']):>12} ms",
        f"    source stop (DT2)      {_figure(told['dt2_ms']):>12} ms",
        f"    destination start      {_figure(told['start_ms']):>12} ms",
        f"  QEMU's own 'downtime'    {_figure(told['vmm_downtime_ms']):>12} ms",
        f"  frames: {guest['sent']:,} sent, {guest['lost']} lost, {guest['duplicated']} twice, "
        f"{guest['answers_lost']} answers lost; by the devices' counters {_count(told['device']['lost'])} lost",
        f"  TCP: {guest['tcp']['echoed']:,} bytes there and back, {guest['tcp']['wrong']} wrong, "
        f"{guest['tcp']['broken']} connections broken",
        f"  memory: {guest['memory']['verified']:,} pages verified, {guest['memory']['wrong']} wrong",
        "",
    ]
    wrong = faults(told)
    lines.append(
        f"The guest moved; its network stood still for {_still(outcome, guest['move_gap_ms'])} ms at the move and "
        f"{_still(outcome, guest['switch_gap_ms'])} ms at the switch before it."
        if not wrong
        else "The guest did not arrive whole: " + "; ".join(wrong)
    )
    return "\n".join(lines)


def compare(rows: Sequence[dict[str, Any]]) -> str:
    """Return all rows as one table, each profile's against its first."""
    lines = [
        "",
        f"{'QEMU':<6}{'back-end':<12}{'costs':<13}{'switch ms':>20}{'stop to run ms':>20}{'longest gap ms':>16}",
    ]
    first: dict[str, dict[str, Any]] = {}
    for each in rows:
        base = first.setdefault(each["profile"], each)
        gap = each["guest"]["longest_gap_ms"]
        lines.append(
            f"{each['vmm']:<6}{each['backend']:<12}{each['profile']:<13}"
            f"{_against(each['switch_ms'], base['switch_ms']):>20}"
            f"{_against(each['stop_to_run_ms'], base['stop_to_run_ms']):>20}{_figure(gap):>16}"
        )
    lines += [line for each in rows if each["backend"] == SERVE for line in _judged(each, first[each["profile"]])]
    return "\n".join(lines)


def _judged(served: dict[str, Any], qemu: dict[str, Any]) -> list[str]:
    """Return for each figure what part of QEMU's it is, and where the time goes if that is more than is wanted."""
    if served is qemu:
        return []
    lines = [""]
    for name, (what, wanted) in WANTED.items():
        if served[name] is None or not qemu[name]:
            lines.append(f"{served['profile']}: {what} unknown")
            continue
        ratio = qemu[name] / served[name]
        reached = ratio >= wanted
        lines.append(
            f"{served['profile']}: {what} is 1/{ratio:,.0f} of QEMU's, {'which' if reached else 'not what'} is wanted "
            f"(1/{wanted})"
        )
        if not reached and name == "stop_to_run_ms":
            lines.append(
                f"  of {_figure(served[name])} ms, {_figure(served['vmm_ms'])} ms are QEMU's and "
                f"{_figure(served['serve_ms'])} ms serve's; calls on the devices: "
                + ", ".join(_part(part) for part in served["calls"][:SHOWN])
            )
    return lines


def _part(part: dict[str, Any]) -> str:
    return f"{part['count']} x {part['call']} on the {part['device']} {_figure(part['ms'])} ms"


def _against(value: float | None, base: float | None) -> str:
    if value is None or not base or value == base:
        return _figure(value)
    return f"1/{base / value:,.0f}  {_figure(value)}" if value < base else f"{value / base:,.1f} x  {_figure(value)}"
