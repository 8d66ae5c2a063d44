"""KVM or emulation: KVM only where a VM of the lab has been seen to boot with it."""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit import qemu
from labkit.cache import Cache
from labkit.errors import LabError

DEVICE = Path("/dev/kvm")
PROOF_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """Which accelerator is used, and why."""

    mode: str
    why: str


def identity() -> str:
    """Return what a proof holds for: this QEMU, this host's kernel, this boot of it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{qemu.version()} {platform.release()} {boot}"


def remembered(cache: Cache) -> Verdict | None:
    """Return the verdict of an earlier proof that still holds."""
    try:
        stored = json.loads(cache.accelerator.read_text())
    except (OSError, ValueError):
        return None
    if stored.get("identity") != identity():
        return None
    return Verdict(stored["mode"], stored["why"])


def decide(cache: Cache, wanted: str, proof: Callable[[float], None]) -> Verdict:
    """Choose the accelerator; `proof(limit)` boots a VM with KVM and raises if that does not work."""
    if wanted != "auto":
        return Verdict(wanted, "as asked for")
    known = remembered(cache)
    if known:
        return known
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Verdict("tcg", f"there is no usable {DEVICE}")
    try:
        proof(PROOF_S)
        verdict = Verdict("kvm", "a VM booted with it")
    except LabError as error:
        verdict = Verdict("tcg", f"{DEVICE} is there, but a VM with KVM failed: {error.what}")
    cache.accelerator.write_text(json.dumps({"identity": identity(), **asdict(verdict)}) + "\n")
    return verdict


def describe(verdict: Verdict) -> str:
    """Return one line for the user."""
    names = {"kvm": "KVM", "tcg": "software emulation (TCG)", "icount": "software emulation with virtual time"}
    return f"{names[verdict.mode]}: {verdict.why}"
