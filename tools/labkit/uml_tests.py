"""Which tests run under User Mode Linux: those of tests/kernel, but for what is listed here, each with the reason."""

from collections.abc import Sequence

from labkit.errors import LabError

FOLDER = "tests/kernel"
VDUSE = "The kernel's vduse depends on ARCH_HAS_DMA_OPS, which User Mode Linux lacks."
DIRTY = "Guest memory moves, and User Mode Linux cannot tell which pages were written (PAGEMAP_SCAN, soft-dirty bits)."
KPROBES = "Calls of other processes are recorded by kprobes, which User Mode Linux lacks."
PIECES = "It takes memory in one physical piece, so huge pages, which User Mode Linux lacks."
LEFT_OUT = {
    **dict.fromkeys((f"{FOLDER}/test_{name}.py" for name in ("watch", "watch_hard", "watch_qemu")), KPROBES),
    **dict.fromkeys((f"{FOLDER}/test_{name}.py" for name in ("migrate", "migration_failures", "pages")), DIRTY),
    f"{FOLDER}/test_send_receive.py": DIRTY,
    f"{FOLDER}/test_names.py::test_migrate_and_ladder_take_names": DIRTY,
    f"{FOLDER}/test_names.py::test_send_and_receive_take_names": DIRTY,
    f"{FOLDER}/test_hwsim.py::test_a_guest_migrates_with_all_its_pairs_and_its_address": DIRTY,
    f"{FOLDER}/test_hwsim_device.py::test_mem_scale_charges_guest_memory_so_many_times_and_a_ring_once": PIECES,
    f"{FOLDER}/test_hwsim_device.py::test_ring_right_behind_guest_memory_is_not_part_of_it": PIECES,
    f"{FOLDER}/test_serve_uml.py": PIECES,
    f"{FOLDER}/test_vduse.py": VDUSE,
    f"{FOLDER}/test_doctor.py::test_g13_g15_a_device_that_cannot_suspend": VDUSE,
    f"{FOLDER}/test_ioctls.py::test_on_a_device_of_a_daemon": VDUSE,
}
"""Files and tests. A test in a VM never asks whether its device is there: it fails without it. So they are listed."""


def arguments(given: Sequence[str]) -> list[str]:
    """Return pytest's arguments for what was asked for; LabError if it names what cannot run there."""
    paths = [word for word in given if word.startswith("tests") and not word.startswith("-")]
    for path in paths:
        file = path.partition("::")[0].rstrip("/")
        if not file.startswith(FOLDER):
            raise LabError(
                f"--machine uml runs tests of {FOLDER}, and {path} is none",
                "Only tests on a device need a machine.",
                f"tools/lab test {path}",
            )
        for left_out in (path, file):
            if left_out in LEFT_OUT:
                raise LabError(f"--machine uml cannot run {path}", LEFT_OUT[left_out], f"tools/lab test {path}")
    if "install" in given:
        raise LabError("--machine uml cannot try the installation", "It needs no device.", "tools/lab test install")
    return [*([] if paths else [FOLDER]), *given, *without()]


def without() -> list[str]:
    """Return pytest's options that leave out what is listed."""
    return [f"--{'deselect' if '::' in name else 'ignore'}={name}" for name in LEFT_OUT]
