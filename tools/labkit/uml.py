"""Running a command under a debugging kernel, whose root is the lab's tree, and judging what the kernel says of it."""

import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from labkit import kernel_log, xstate
from labkit.environment import INSIDE
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.kernel import Builder
from labkit.progress import seconds
from labkit.session import PROJECT, Request, Session
from labkit.uml_config import DEBUG
from labkit.uml_kernel import KERNEL, OWN, RUN, UmlBuilder, UmlKernel, arguments, as_child
from labkit.vm import default_environment

INIT = Path(__file__).with_name("guest") / "uml.sh"
# The project's own folder may lie below one that gets something else mounted, as /tmp does: it is put there last.
SHARED = "/lab/project"
MEMORY = "2G"
LIMIT_S = 7200.0
POLL_S = 0.5
SHOWN_LINES = 40
# A kernel that checks locks logs that when it starts. (Of KASAN its log says nothing: it is there before the log is.)
WATCHING = ("Lock dependency validator",)


def run(session: Session, request: Request) -> int:
    """Run a command and return its exit status; LabError if the kernel had anything to report."""
    session.set_up(request.kernel, "soak")
    with session.using():
        with session.cache.building_kernel():
            builder = UmlBuilder(Builder(session.cache, session.tree, session.progress), DEBUG)
            kernel = builder.ensure(request.kernel)
            module = builder.module(kernel, PROJECT)
        session.progress.say(f"kernel {kernel.release} as User Mode Linux, with KASAN, kmemleak and lock checking")
        with tempfile.TemporaryDirectory(prefix="uml-", dir=session.cache.root) as name:
            folder = Path(name)
            shutil.copy(module, folder / f"{OWN}.ko")
            shutil.copy(INIT, folder / "init")
            (folder / "init").chmod(0o755)
            (folder / "config.sh").write_text(configuration(request))
            _drive(session, kernel, folder, request.timeout or LIMIT_S)
            return judge(session, folder)


def configuration(request: Request) -> str:
    """Return config.sh: the project's folder and the command, as the program that runs first finds them."""
    variables = {**default_environment(), "PYVHOSTVDPA_LAB_ACCEL": "uml", **request.environment}
    words = ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *request.command]
    project = shlex.quote(str(PROJECT))
    steps = {
        "lab_mounts": f"busybox mkdir -p {project} && busybox mount --bind {SHARED} {project}",
        "lab_command": f"cd {project} && : >{RUN}/begun && exec {shlex.join(words)}",
    }
    return "".join(f"{name}() {{\n    {line}\n}}\n" for name, line in steps.items())


def command_line(memory: str = MEMORY) -> list[str]:
    """Return the arguments that start the kernel within the tree."""
    return [*arguments(memory), "log_buf_len=16M", "loglevel=3", "kmemleak=on"]


def _drive(session: Session, kernel: UmlKernel, folder: Path, limit: float) -> None:
    binds = {PROJECT: SHARED, session.environment.site: INSIDE, folder: RUN, kernel.folder: KERNEL}
    chroot = session.tree.chroot(layers=(kernel.layer,), binds=binds)
    variables = xstate.variables(session.tree, session.progress, folder, RUN)
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), *command_line()]
    argv = ["setpriv", "--pdeathsig", "KILL", *chroot.argv(as_child(words))]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            if not wait_for_end(process, folder / "ended", limit):
                raise LabError(
                    f"time-out: the command ran longer than {seconds(limit)}; the kernel was stopped",
                    "Its output so far is above.",
                    "give it more with --timeout",
                    EXIT_TIMEOUT,
                )
        finally:
            process.kill()


def wait_for_end(process: subprocess.Popen[bytes], ended: Path, limit: float) -> bool:
    """Wait until the kernel is off, or has written all that it has to: at times it spins when it should power off."""
    give_up = time.monotonic() + limit
    while process.poll() is None and not ended.exists():
        if time.monotonic() > give_up:
            return False
        time.sleep(POLL_S)
    return True


def judge(session: Session, folder: Path) -> int:
    """Return the command's exit status; LabError if it never began, or if the kernel had anything to report."""
    texts = {name: _read(folder / name) for name in ("status", "log", "leaks")}
    kept = session.cache.log("debug-kernel")
    kept.write_text(f"{texts['log']}\n{texts['leaks']}")
    look = f"less {kept}   (the kernel's whole log)"
    if not texts["status"].strip() or not texts["log"]:
        raise LabError("the debugging kernel ended before the command did", "Its last words are above.", look)
    if not (folder / "begun").exists():
        raise LabError("the command never began", "The project's folder cannot be entered; why is above.", look)
    found = findings(texts["log"], texts["leaks"])
    if found:
        shown = "\n".join(f"| {line}" for line in found[:SHOWN_LINES])
        raise LabError(f"the kernel reports {len(found)} errors of its own", shown, look)
    status = int(texts["status"])
    ended = f"; the command ended with status {status}" if status else ""
    session.progress.say(f"the kernel has nothing to report: no bad access, no wrong lock, no leak{ended}")
    return status


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def findings(log: str, leaks: str) -> list[str]:
    """Return what a kernel's log and its list of leaked blocks hold against us."""
    found = [f"it does not watch: its log lacks {words!r}" for words in WATCHING if words not in log]
    found += kernel_log.reports(log.splitlines())
    blocks = re.split(r"^(?=unreferenced object)", leaks, flags=re.MULTILINE)
    return found + [line for block in blocks if f"[{OWN}]" in block for line in block.splitlines()]
