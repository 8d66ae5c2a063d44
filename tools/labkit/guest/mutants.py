"""In the VM: try each mutant of a plan, and write down what pytest said of it.

Arguments: the plan (a list of name, module to load, folder of the installed package if it is changed, tests, rules of
`vhost-vdpa check`) and the file of results, one JSON object per line: the name when a mutant is begun, name and status
when it is done.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# for each file: tests of a device take minutes on an emulated machine with all its CPUs busy
LIMIT_S = 900.0
KILL_S = 30.0
EXIT_TIMEOUT = 124
NOTHING_TOLD = 2
"""Says that what should have tried a mutant did not: pytest's own status for that."""
BUS = Path("/sys/bus/vdpa/devices")
LOADED = Path("/sys/module/vdpa_hwsim")
PARAMETERS = LOADED / "parameters"
DEVICE = "checked0"
EVERYTHING = {"extra_features": sum(1 << bit for bit in (2, 15, 18, 20, 21, 27, 28, 29)), "doorbell_us": 500}
"""What makes check try almost every rule (tests/kernel/test_check.py)."""
SYSRQ = Path("/proc/sysrq-trigger")


class StuckError(Exception):
    """What runs cannot be killed: it loops in the kernel, or waits there for ever."""


def load(module: str) -> bool:
    """Put a module in the place of the one that is loaded; False if that one does not go."""
    if LOADED.exists():
        for device in sorted(BUS.iterdir()):
            if device.resolve().parent.name == "vdpa_hwsim":
                subprocess.run(["timeout", "20", "vdpa", "dev", "del", device.name], check=False)
        if subprocess.run(["timeout", "20", "rmmod", "vdpa_hwsim"], check=False).returncode:
            return False
    return subprocess.run(["insmod", module], check=False).returncode == 0


def check(rules: list[str]) -> int:
    """Try rules on a device of the module: 0 if none fails, 1 if one does."""
    for name, value in EVERYTHING.items():
        (PARAMETERS / name).write_text(str(value))
    add = ["vdpa", "dev", "add", "name", DEVICE, "mgmtdev", "vdpa_hwsim", "mac", "52:54:91:01:02:03", "max_vqp", "2"]
    if subprocess.run(["timeout", "20", *add], check=False).returncode:
        return NOTHING_TOLD
    try:
        return _told(["timeout", "-k", "5", f"{LIMIT_S:g}", "vhost-vdpa", "check", DEVICE, "--json", "--only", *rules])
    finally:
        for name in EVERYTHING:
            (PARAMETERS / name).write_text("0")
        subprocess.run(["timeout", "20", "vdpa", "dev", "del", DEVICE], check=False)


def _told(argv: list[str]) -> int:
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=LIMIT_S + KILL_S)
    except subprocess.TimeoutExpired:
        raise StuckError from None
    if process.returncode == EXIT_TIMEOUT:
        return EXIT_TIMEOUT
    try:
        told = json.loads(output)
    except ValueError:
        return NOTHING_TOLD
    for rule in told["rules"]:
        if rule["verdict"] == "fail":
            print(f"{rule['id']}: {rule['detail']}", flush=True)
    print(told["counts"], flush=True)
    return int(told["counts"]["fail"] > 0)


def attempt(step: dict[str, object]) -> int:
    """Return pytest's exit status for a step."""
    environment = dict(os.environ)
    if "site" in step:
        environment["PYTHONPATH"] = str(step["site"])
    tests, rules = step["tests"], step.get("check")
    assert isinstance(tests, list)
    if isinstance(rules, list) and rules:
        status = check(rules)
        if status or not tests:
            return status
    argv = ["python3", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]
    limit = LIMIT_S * max(1, sum(str(word).startswith("tests/") for word in tests))
    process = subprocess.Popen(["timeout", "-k", "5", f"{limit:g}", *argv], env=environment)
    try:
        return process.wait(limit + KILL_S)
    except subprocess.TimeoutExpired:
        raise StuckError from None


def main(plan: Path, results: Path) -> int:
    """Work off a plan; 1 if a new VM has to continue it."""
    with results.open("a", buffering=1) as out:
        for step in json.loads(plan.read_text()):
            if not load(str(step["module"])):
                print(
                    f"the module of the mutant before {step['name']} does not go; the rest takes another VM", flush=True
                )
                return 1
            print(f"-- {step['name']}", flush=True)
            print(json.dumps({"name": step["name"]}), file=out)
            try:
                status, stuck = attempt(step), False
            except StuckError:
                status, stuck = EXIT_TIMEOUT, True
            print(json.dumps({"name": step["name"], "status": status}), file=out)
            out.flush()
            os.fsync(out.fileno())
            if stuck:
                print("the kernel does not release it; the rest takes another VM", flush=True)
                SYSRQ.write_text("b")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
