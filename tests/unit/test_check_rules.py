"""What rules of check demand, and what they must not: a device that the specification allows does not fail."""

from __future__ import annotations

import ast
import errno
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock, PropertyMock

import pytest
from door_double import OFFERED, DoorDouble

from pyvhostvdpa.base.errors import KernelError
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.probe.check.bench import Bench
from pyvhostvdpa.probe.check.queue import Used
from pyvhostvdpa.probe.check.rule import BLOCK, Broken, CannotTell, Group, NotOffered, select
from pyvhostvdpa.probe.check.rules import all_groups, catalogue
from pyvhostvdpa.probe.check.work import NetWork, second_pair_rests
from pyvhostvdpa.trace import Trace

PATH = "/dev/vhost-vdpa-double"


def opener(path: str, trace: Trace) -> VhostVdpa:
    return cast(VhostVdpa, DoorDouble(OFFERED))


def _started_on_old_maps(source: str) -> list[str]:
    """Return functions that reset a device and start it again on memory that was mapped before the reset."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            for after in ast.unparse(node).split("bench.reset()")[1:]:
                between, *rest = re.split(r"\.start\(|bench\.driver_ok\(", after)
                if rest and not re.search(r"\bmap\(|restart\(", between):
                    found.append(node.name)
    return found


@pytest.mark.parametrize("group", all_groups(), ids=lambda group: group.name)
def test_memory_is_mapped_again_after_a_reset(group: Group) -> None:
    """Without IOTLB_PERSIST a reset may take the maps along (VDPA_RESET_F_CLEAN_MAP); one rule is about that."""
    act = group.rules[0].act
    found = _started_on_old_maps(inspect.getsource(sys.modules[getattr(act, "func", act).__module__]))
    assert [name for name in found if name != "persist"] == []


def test_restart_maps_between_reset_and_negotiation(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(PATH, opener=opener) as bench:
        bench.prepare()
        told: list[str] = []
        for name in ("reset", "unmap", "map", "negotiate"):
            monkeypatch.setattr(bench, name, lambda name=name: told.append(name))
        bench.restart()
    assert told == ["reset", "unmap", "map", "negotiate"]


# -- what the specification or an older kernel allows -----------------------------------------


def act_of(name: str) -> Callable[..., str]:
    [found] = select(catalogue(), [name])
    return found.act


def verdict(name: str, bench: object) -> str:
    """Try a rule on something that stands for a bench; return pass, fail, unknown or not_offered."""
    try:
        act_of(name)(bench)
    except Broken:
        return "fail"
    except CannotTell:
        return "unknown"
    except NotOffered:
        return "not_offered"
    return "pass"


def in_rules(monkeypatch: pytest.MonkeyPatch, name: str, helper: str, gives: object) -> None:
    """Have a rule's module take ``gives`` for what its ``helper`` returns."""
    monkeypatch.setattr(sys.modules[act_of(name).__module__], helper, lambda *rest: gives)


@pytest.mark.parametrize(
    ("features", "seen"),
    [
        (Feature.VERSION_1 | Feature.CTRL_RX_EXTRA | Feature.CTRL_GUEST_OFFLOADS | Feature.HASH_REPORT, "pass"),
        (Feature.HOST_USO | Feature.CSUM | Feature.NOTF_COAL | Feature.CTRL_VQ, "pass"),
        (Feature.HOST_USO, "fail"),
        (Feature.NOTF_COAL, "fail"),
        (Feature.CTRL_RX, "fail"),
    ],
)
def test_features_need_what_the_specification_lists(features: Feature, seen: str) -> None:
    bench = SimpleNamespace(c=SimpleNamespace(get_features=lambda: int(features)))
    assert verdict("identity.feature_needs", bench) == seen


def refusing(number: int) -> Callable[..., None]:
    def act(*rest: object) -> None:
        if number:
            raise KernelError(number, "ioctl")

    return act


@pytest.mark.parametrize(
    ("number", "seen"),
    [(0, "fail"), (errno.EINVAL, "pass"), (errno.ENOBUFS, "pass"), (errno.EOPNOTSUPP, "pass"), (errno.EIO, "fail")],
)
def test_a_group_that_does_not_exist_is_refused_by_kernel_or_parent(
    number: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(PATH, opener=opener) as bench:
        monkeypatch.setattr(bench.c, "set_group_asid", refusing(number))
        assert verdict("groups.group_range", bench) == seen


@pytest.mark.parametrize(("number", "seen"), [(0, "unknown"), (errno.EINVAL, "pass"), (errno.EIO, "fail")])
def test_requests_that_only_newer_kernels_refuse_are_not_held_against_the_parent(number: int, seen: str) -> None:
    with Bench(PATH, opener=opener) as bench:
        try:
            bench.refused_by_core(refusing(number), "SET_VRING_BASE")
            told = "pass"
        except (CannotTell, Broken) as e:
            told = "unknown" if isinstance(e, CannotTell) else "fail"
    assert told == seen


@pytest.mark.parametrize("name", ["resume.not_offered", "suspend.not_offered"])
@pytest.mark.parametrize(("number", "seen"), [(errno.ENOTTY, "pass"), (errno.EOPNOTSUPP, "pass"), (0, "fail")])
def test_a_kernel_that_is_older_than_a_request_may_not_know_it(
    name: str, number: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(PATH, opener=opener) as bench:
        bench.facts = replace(bench.facts, backend=BackendFeature(0))
        for request in ("suspend", "resume"):
            monkeypatch.setattr(bench.c, request, refusing(number))
        in_rules(monkeypatch, name, "running", None)
        assert verdict(name, bench) == seen


def test_queues_that_were_not_negotiated_are_not_set_up() -> None:
    with Bench(PATH, opener=opener) as bench:
        facts = replace(bench.facts, vqs_count=5, pairs=2, features=Feature.CTRL_VQ | Feature.MQ)
        assert facts.queues == (0, 1, 2, 3, 4)
        assert replace(facts, pairs=1, features=Feature.CTRL_VQ).queues == (0, 1, 2)
        assert replace(facts, pairs=1, features=Feature(0)).queues == (0, 1)
        assert replace(facts, device_id=BLOCK).queues == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(("length", "seen"), [(1, "pass"), (0, "unknown"), (2, "fail")])
def test_used_length_of_an_answer_may_be_an_underestimate(
    length: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = MagicMock()
    control.queue.collect.return_value = [Used(0, length)]
    in_rules(monkeypatch, "control.answer_length", "controlled", (None, control))
    assert verdict("control.answer_length", None) == seen


@pytest.mark.parametrize(("length", "seen"), [(1025, "pass"), (1024, "unknown"), (1026, "fail")])
def test_used_length_of_a_read_may_be_an_underestimate(length: int, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = MagicMock()
    job.wait.return_value = [Used(0, length)]
    in_rules(monkeypatch, "block.read_length", "running_block", job)
    assert verdict("block.read_length", None) == seen


@pytest.mark.parametrize(("behind", "seen"), [(b"\xee" * 7, "pass"), (b"\0" + b"\xee" * 6, "unknown")])
def test_more_may_be_written_than_is_used(behind: bytes, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    control = MagicMock()
    control.room.read.return_value = b"\1" + behind
    in_rules(monkeypatch, "control.answer_room", "controlled", (None, control))
    assert verdict("control.answer_room", None) == seen


class StandIn:
    """A queue with a used index for each time that it is asked for."""

    index = 0

    def __init__(self, called: bool, *used: int) -> None:
        self._called, self._used = called, list(used)

    def called(self, seconds: float) -> bool:
        return self._called

    @property
    def used_index(self) -> int:
        return self._used.pop(0)


@pytest.mark.parametrize(("called", "seen"), [(False, "pass"), (True, "unknown")])
def test_an_interrupt_for_nothing_is_permitted(called: bool, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = MagicMock(queues=[StandIn(called, 4, 4)])
    in_rules(monkeypatch, "interrupts.none_without_work", "running", job)
    assert verdict("interrupts.none_without_work", None) == seen
    in_rules(monkeypatch, "suspend.no_interrupt", "suspended", job)
    assert verdict("suspend.no_interrupt", None) == seen


def test_an_interrupt_for_a_descriptor_that_was_used_while_suspended_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    in_rules(monkeypatch, "suspend.no_interrupt", "suspended", MagicMock(queues=[StandIn(True, 4, 5)]))
    assert verdict("suspend.no_interrupt", None) == "fail"


def _busy(what: str, count: int = 1) -> None:
    raise Broken(f"{what}: used indices moved")


@pytest.mark.parametrize(("received", "seen"), [([0, 1], Broken), ([0, 0], CannotTell)])
def test_a_pair_that_was_not_asked_for_may_send_and_must_not_receive(
    received: list[int], seen: type[Exception]
) -> None:
    job = MagicMock(ignored=_busy)
    type(job.rx).used_index = PropertyMock(side_effect=received)
    with pytest.raises(seen):
        second_pair_rests(job, "the second pair")


def test_a_device_that_needs_a_reset_may_still_use_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    job = MagicMock()
    job.rests.side_effect = Broken("moved")
    in_rules(monkeypatch, "robust.needs_reset_stops", "running", job)
    assert verdict("robust.needs_reset_stops", MagicMock()) == "unknown"


@pytest.mark.parametrize(("whole", "seen"), [(bytes(8), "unknown"), (b"\1" + bytes(7), "pass")])
def test_a_drive_without_a_medium_may_have_no_sectors(whole: bytes, seen: str) -> None:
    bench = MagicMock()
    bench.c.get_config.return_value = whole
    assert verdict("config.capacity", bench) == seen


@pytest.mark.parametrize(("sends_unasked", "seen"), [(True, "pass"), (False, "fail")])
def test_a_device_that_looks_by_itself_need_not_move_avail_event(
    sends_unasked: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = MagicMock()
    job.tx.avail_event, job.tx.avail_index = 0, 5
    job.finish.side_effect = None if sends_unasked else Broken("not used")
    in_rules(monkeypatch, "rings.event_kick", "_started", job)
    assert verdict("rings.event_kick", None) == seen
    job.submit.assert_called_once_with()


@pytest.mark.parametrize(("frames", "seen"), [([], "unknown"), ([Used(0, 0)], "pass")])
def test_a_device_may_limit_the_descriptors_of_a_chain(
    frames: list[Used], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = MagicMock()
    job.wait.return_value = frames
    in_rules(monkeypatch, "rings.many_parts", "running_net", job)
    bench = MagicMock()
    bench.ring_size.return_value = 64
    assert verdict("rings.many_parts", bench) == seen
    assert verdict("rings.header_split", bench) == ("pass" if frames else "fail")


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.EOPNOTSUPP])
def test_binding_may_be_refused_with_any_number_while_the_device_runs(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = MagicMock()
    in_rules(monkeypatch, "groups.bind_running", "work", job)
    bench = MagicMock(group_of=(0, 0, 1))
    bench.facts.desc_groups = None
    bench.errno_of.return_value = number
    assert verdict("groups.bind_running", bench) == "pass"
    bench.errno_of.return_value = 0
    assert verdict("groups.bind_running", bench) == "unknown"


@pytest.mark.parametrize("name", ["groups.control_apart", "desc.control_with_rings"])
def test_a_group_that_control_and_data_queues_share_is_left_alone(name: str) -> None:
    bench = MagicMock(group_of=(0, 0, 1))
    bench.facts.desc_groups, bench.facts.is_block = (2, 2, 2), False
    bench.needs_control.return_value = 2
    assert verdict(name, bench) == "not_offered"
    bench.bind.assert_not_called()


@pytest.mark.parametrize(
    ("name", "seen"), [("status.other_features", "unknown"), ("control.mac_not_negotiated", "unknown")]
)
def test_a_subset_of_the_features_only_should_be_accepted(
    name: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(PATH, opener=opener) as bench:
        whole = int(bench.facts.features)

        def negotiate(features: int | None = None) -> None:
            if features not in (None, whole):
                raise Broken("FEATURES_OK was not accepted")

        bench.facts = replace(bench.facts, offered=bench.facts.offered | Feature.MTU | Feature.CTRL_MAC_ADDR)
        bench.facts = replace(bench.facts, features=bench.facts.features | Feature.MTU | Feature.CTRL_MAC_ADDR)
        monkeypatch.setattr(bench, "negotiate", negotiate)
        assert verdict(name, bench) == seen


@pytest.mark.parametrize(
    ("pinned", "why"),
    [(True, ""), (False, "the parent works on user addresses"), (None, "whether the parent pins is unknown")],
)
def test_a_rule_about_pinned_memory_is_for_a_parent_that_pins(pinned: bool | None, why: str) -> None:
    with Bench(PATH, opener=opener) as bench:
        bench.facts = replace(bench.facts, pinned=pinned)
        try:
            bench.needs_pinning()
            said = ""
        except NotOffered as e:
            said = str(e)
    assert said == why


@pytest.mark.parametrize("name", ["iotlb.spaces_apart", "iotlb.batch_other_space", "left.close_in_a_batch"])
def test_a_rule_about_two_address_spaces_is_not_for_one(name: str) -> None:
    with Bench(PATH, opener=opener) as bench:
        bench.facts = replace(bench.facts, as_num=1)
        assert verdict(name, bench) == "not_offered"


@pytest.mark.parametrize(
    ("module", "back", "seen"),
    [("vdpa_hwsim", True, "fail"), ("vp_vdpa", True, "unknown"), ("vp_vdpa", False, "pass"), (None, True, "fail")],
)
def test_an_iommu_without_write_only_is_no_fault_of_the_parent(
    module: str | None, back: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = MagicMock(spec=NetWork)
    job.tx, job.bench = MagicMock(), None
    job.frame.return_value = b"frame"
    job.receive.return_value = [b"frame"] if back else []
    in_rules(monkeypatch, "maps.write_only", "running", job)
    in_rules(monkeypatch, "maps.write_only", "_extra", MagicMock())
    bench = MagicMock()
    bench.facts.module = module
    assert verdict("maps.write_only", bench) == seen


@pytest.mark.parametrize(("module", "size"), [("snet_vdpa", 256), ("eni_vdpa", 256), ("vdpa_sim", 64), (None, 64)])
def test_rings_have_the_size_that_a_parent_insists_on(module: str | None, size: int) -> None:
    with Bench(PATH, opener=opener) as bench:
        bench.facts = replace(bench.facts, module=module, ring_max=256, ring_sizes=(256, 256, 256))
        assert bench.ring_size(0, 1) == size
        assert bench.ring_size(2, most=16) == (256 if size == 256 else 16)


def test_a_ring_of_one_size_cannot_have_another_before_a_reset() -> None:
    with Bench(PATH, opener=opener) as bench:
        bench.facts = replace(bench.facts, module="snet_vdpa", ring_max=256, ring_sizes=(256, 256, 256))
        assert verdict("queues.num_default_forgotten", bench) == "unknown"


@pytest.mark.parametrize(("module", "sizes"), [("snet_vdpa", [256]), ("vdpa_sim", [16, 32, 64, 128, 256])])
def test_every_ring_size_of_a_parent_is_tried(module: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def works_with(bench: Bench, sizes: list[int]) -> str:
        tried.extend(sizes)
        return ""

    monkeypatch.setattr(sys.modules[act_of("queues.size_each").__module__], "_works_with", works_with)
    with Bench(PATH, opener=opener) as bench:
        bench.facts = replace(bench.facts, module=module, ring_max=256, ring_sizes=(256, 256, 256))
        assert verdict("queues.size_each", bench) == "pass"
    assert tried == sizes
