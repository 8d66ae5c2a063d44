"""What makes each rule of `vhost-vdpa check` fail: a fault switch of vdpa_hwsim, or a door that lies.

`FAULTS` are the faults, `CAUGHT` the rules that each makes fail: test_check.py tries a few every day, and all with
CHECK_EVERY_FAULT=1. `UNBROKEN` are rules that nothing here makes fail, and why. Every rule is in one of the two, or a
parent of the kernel breaks it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pyvhostvdpa.base.errors import KernelError
from pyvhostvdpa.base.uapi import BackendFeature, Status
from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.probe.check.known import KNOWN
from pyvhostvdpa.probe.check.rule import BLOCK
from pyvhostvdpa.probe.check.rules import catalogue
from pyvhostvdpa.trace import Trace


@dataclass(frozen=True)
class Breaker:
    """One fault: a switch of vdpa_hwsim, or changes of the door's methods."""

    switch: str = ""
    door: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def opener(self, path: str, trace: Trace) -> VhostVdpa:
        """Open the device through a door that lies."""
        kind = type("LyingDoor", (VhostVdpa,), dict(self.door))
        return cast(VhostVdpa, kind(path, trace))


def switch(name: str) -> Breaker:
    return Breaker(name)


def lies(**methods: Callable[..., Any]) -> Breaker:
    return Breaker(door=methods)


def swallowing(name: str) -> Callable[..., Any]:
    """A method whose errors never arrive: what should be refused seems to be taken."""
    real = getattr(VhostVdpa, name)

    def call(self: VhostVdpa, *arguments: Any) -> Any:
        try:
            return real(self, *arguments)
        except KernelError:
            return b"" if name in ("get_config", "request") else 0

    return call


def refusing(name: str, number: int = errno.EIO) -> Callable[..., Any]:
    """A method that the kernel always refuses."""

    def call(self: VhostVdpa, *arguments: Any) -> Any:
        raise KernelError(number, name)

    return call


def changed(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A method whose answer is another one."""
    real = getattr(VhostVdpa, name)
    return lambda self, *arguments: change(real(self, *arguments))


def drifting(name: str) -> Callable[..., Any]:
    """A number that is one more each time it is asked for."""
    real, asked = getattr(VhostVdpa, name), [0]

    def call(self: VhostVdpa, *arguments: Any) -> Any:
        asked[0] += 1
        return real(self, *arguments) + asked[0]

    return call


def _ignoring(name: str) -> Callable[..., Any]:
    """A method that says that it was done, and does nothing."""
    return lambda self, *arguments: None


def unless_unbinding(name: str) -> Callable[..., Any]:
    """A method that does not unbind an eventfd (-1), and says that it did."""
    real = getattr(VhostVdpa, name)
    return lambda self, *arguments: None if arguments[-1] == -1 else real(self, *arguments)


def closing_once() -> Callable[..., Any]:
    """A close that only the first user gets: the one that asks what the device is."""
    real, asked = VhostVdpa.close, [0]

    def call(self: VhostVdpa) -> None:
        asked[0] += 1
        if asked[0] == 1:
            real(self)

    return call


def refusing_all_of_it() -> Callable[..., Any]:
    """A configuration space that cannot be read as a whole."""
    real = VhostVdpa.get_config

    def call(self: VhostVdpa, offset: int, length: int) -> bytes:
        if length > 8:
            raise KernelError(errno.EIO, "get_config")
        return real(self, offset, length)

    return call


def bytearray_page() -> Any:
    """Return a page that is not a doorbell."""
    import mmap  # noqa: PLC0415

    return mmap.mmap(-1, mmap.PAGESIZE)


FAULTS: dict[str, Breaker] = {
    "base_far": lies(get_vring_base=changed("get_vring_base", lambda n: (n + 200) & 0xFFFF)),
    "no_call": switch("no_call"),
    "call_always": switch("call_always"),
    "no_config_call": switch("no_config_call"),
    "config_call": switch("config_call"),
    "keep_asid": switch("keep_asid"),
    "keep_ready": switch("keep_ready"),
    "keep_base": switch("keep_base"),
    "keep_status": switch("keep_status"),
    "keep_ctrl": switch("keep_ctrl"),
    "keep_fault": switch("keep_fault"),
    "ignore_perm": switch("ignore_perm"),
    "stale_map": switch("stale_map"),
    "one_as": switch("one_as"),
    "corrupt_frame": switch("corrupt_frame"),
    "write_beyond": switch("write_beyond"),
    "short_len": switch("short_len"),
    "tx_len": switch("tx_len"),
    "num_buffers": switch("num_buffers"),
    "junk_header": switch("junk_header"),
    "lose_frames": switch("lose_frames"),
    "cvq_ok": switch("cvq_ok"),
    "cvq_err": switch("cvq_err"),
    "cvq_len": switch("cvq_len"),
    "cvq_long": switch("cvq_long"),
    "cvq_half": switch("cvq_half"),
    "cvq_suspended": switch("cvq_suspended"),
    "cvq_mute": switch("cvq_mute"),
    "suspended_status": switch("suspended_status"),
    "wake_by_status": switch("wake_by_status"),
    "wake_by_enable": switch("wake_by_enable"),
    "wake_by_kick": switch("wake_by_kick"),
    "lie_suspend": switch("lie_suspend"),
    "lie_resume": switch("lie_resume"),
    "resume_at_0": switch("resume_at_0"),
    "lie_persist": switch("lie_persist"),
    "lie_desc_asid": switch("lie_desc_asid"),
    "lie_enable": switch("lie_enable"),
    "base_off": switch("base_off"),
    "base_moves": switch("base_moves"),
    "early": switch("early"),
    "not_ready": switch("not_ready"),
    "no_features_ok": switch("no_features_ok"),
    "no_driver_ok": switch("no_driver_ok"),
    "features_move": switch("features_move"),
    "config_moves": switch("config_moves"),
    "bad_group": switch("bad_group"),
    "num_ignored": switch("num_ignored"),
    "addr_kept": switch("addr_kept"),
    "event_ignored": switch("event_ignored"),
    "indirect_first": switch("indirect_first"),
    "chain_first": switch("chain_first"),
    "all_pairs": switch("all_pairs"),
    "used_twice": switch("used_twice"),
    "size_beyond": switch("size_beyond"),
    "rings_in_1": switch("rings_in_1"),
    "stall": switch("stall"),
    "device_id_0": lies(get_device_id=changed("get_device_id", lambda n: 0)),
    "one_queue": lies(get_vqs_count=changed("get_vqs_count", lambda n: 1)),
    "odd_ring": lies(get_vring_num=changed("get_vring_num", lambda n: n - 1)),
    "no_range": lies(get_iova_range=changed("get_iova_range", lambda r: (r[1], r[0]))),
    "no_group": lies(get_group_num=changed("get_group_num", lambda n: 0)),
    "drifting": lies(get_config_size=drifting("get_config_size")),
    "legacy": lies(get_features=changed("get_features", lambda f: f & ~(1 << 32))),
    "no_cvq": lies(get_features=changed("get_features", lambda f: f & ~(1 << 17))),
    "no_asid": lies(
        get_backend_features=changed(
            "get_backend_features", lambda f: f & ~(BackendFeature.IOTLB_ASID | BackendFeature.DESC_ASID)
        )
    ),
    "resume_alone": lies(get_backend_features=changed("get_backend_features", lambda f: f & ~BackendFeature.SUSPEND)),
    "status_1": lies(get_status=changed("get_status", lambda s: Status(s | 1))),
    "backend_taken": lies(set_backend_features=swallowing("set_backend_features")),
    "owner_taken": lies(set_owner=swallowing("set_owner")),
    "queues_taken": lies(
        **{
            name: swallowing(name)
            for name in (
                "set_vring_num",
                "set_vring_base",
                "get_vring_base",
                "set_vring_addr",
                "set_vring_kick",
                "set_vring_call",
                "set_vring_enable",
            )
        }
    ),
    "requests_taken": lies(request=swallowing("request")),
    "config_taken": lies(get_config=swallowing("get_config"), set_config=swallowing("set_config")),
    "config_zero": lies(get_config=changed("get_config", lambda b: bytes(len(b)))),
    "config_ones": lies(get_config=changed("get_config", lambda b: b"\xff" * len(b))),
    "config_small": lies(get_config_size=changed("get_config_size", lambda n: 4)),
    "config_refused": lies(get_config=refusing_all_of_it()),
    "features_taken": lies(set_features=swallowing("set_features")),
    "status_taken": lies(set_status=swallowing("set_status")),
    "status_ignored": lies(set_status=_ignoring("set_status")),
    "groups_taken": lies(set_group_asid=swallowing("set_group_asid")),
    "groups_refused": lies(set_group_asid=refusing("set_group_asid")),
    "groups_drift": lies(get_vring_group=drifting("get_vring_group")),
    "messages_taken": lies(write_iotlb=swallowing("write_iotlb")),
    "messages_refused": lies(write_iotlb=refusing("write_iotlb", errno.EFAULT)),
    "suspend_refused": lies(suspend=refusing("suspend")),
    "call_ignored": lies(set_vring_call=_ignoring("set_vring_call")),
    "kick_ignored": lies(set_vring_kick=_ignoring("set_vring_kick")),
    "config_call_taken": lies(set_config_call=swallowing("set_config_call")),
    "config_call_ignored": lies(set_config_call=_ignoring("set_config_call")),
    "config_call_refused": lies(set_config_call=refusing("set_config_call")),
    "doorbell_dead": lies(mmap_doorbell=lambda self, index: bytearray_page()),
    "call_refused": lies(set_vring_call=refusing("set_vring_call")),
    "addr_refused": lies(set_vring_addr=refusing("set_vring_addr")),
    "close_ignored": lies(close=closing_once()),
    "kick_kept": lies(set_vring_kick=unless_unbinding("set_vring_kick")),
    "config_call_kept": lies(set_config_call=unless_unbinding("set_config_call")),
}
"""Faults by name."""

_CAUGHT = {
    "base_far": "suspend.base_between",
    "no_call": """
        interrupts.raised interrupts.receive interrupts.after_used interrupts.none_lost
        interrupts.set_while_running interrupts.wanted_again interrupts.both_directions control.interrupts
        resume.interrupts resume.new_call
    """,
    "no_config_call": "config_irq.needs_reset config_irq.replaced",
    "config_call": "config_irq.none_unasked",
    "keep_asid": "groups.reset_to_0 desc.reset_to_0",
    "keep_ready": "reset.disables",
    "keep_base": "queues.base_zero queues.base_unset left.bases_gone",
    "keep_status": """
        reset.opened reset.acknowledged reset.driver reset.features_set reset.features_ok reset.set_up reset.idle
        reset.worked reset.loaded reset.suspended reset.resumed reset.failed reset.in_a_batch status.zero_resets
        left.close_running left.close_loaded left.close_suspended left.killed left.killed_suspended
        left.opened_often left.started_often left.held_by_a_copy reset.twice reset.many reset.old_kicks
        status.driver_ok_alone
    """,
    "keep_ctrl": "reset.control_state reset.receive_modes",
    "keep_fault": """
        robust.head_beyond robust.head_far_beyond robust.next_beyond robust.loop_self robust.loop_long
        robust.avail_jump robust.avail_back robust.buffer_unmapped robust.buffer_over_end robust.buffer_wraps
        robust.indirect_odd robust.indirect_unasked robust.readable_after_writable robust.desc_unmapped
        robust.avail_unmapped robust.used_unmapped robust.rings_unmapped_later robust.used_read_only
        robust.random reset.needs_reset robust.unknown_flags robust.length_huge robust.length_zero
        robust.only_writable
    """,
    "ignore_perm": "maps.read_only maps.write_only robust.used_read_only",
    "stale_map": "maps.moved maps.unmapped maps.nothing_mapped robust.rings_unmapped_later",
    "one_as": """
        groups.apart groups.works_in_1 groups.together groups.control_in_1 groups.control_apart desc.apart
        desc.apart_other desc.suspended desc.buffers_only_there
    """,
    "corrupt_frame": """
        data.sizes data.smallest data.patterns data.wrap data.exact_buffer rings.receive_parts maps.pieces
        maps.backwards maps.frame_sizes maps.highest maps.lowest rings.two_parts
    """,
    "short_len": "rings.receive_length",
    "tx_len": "rings.transmit_length",
    "num_buffers": "data.num_buffers data.num_buffers_alone",
    "resume_at_0": "resume.continues",
    "junk_header": "data.header",
    "lose_frames": "data.in_order data.after_suspend resume.under_load",
    "cvq_ok": """
        control.unknown_class control.unknown_command control.one_byte control.mac_short control.mac_empty
        control.mac_table_short control.rx_mode_short control.vlan_short control.offloads_short
        control.pairs_short mq.zero mq.too_many
    """,
    "cvq_err": """
        control.mac_set control.mac_table control.rx_modes control.rx_modes_extra control.vlan
        control.announce_ack control.offloads control.split_parts control.each_its_answer mq.set mq.each_works
        mq.back_to_one
    """,
    "cvq_half": "control.mac_short",
    "cvq_suspended": "suspend.control_stops",
    "cvq_mute": """
        control.many control.one_kick control.place control.beside_data control.after_reset control.after_one_byte
        resume.control desc.control_with_rings control.answer_length control.answer_room
    """,
    "suspended_status": "suspend.status_while",
    "wake_by_status": "suspend.driver_ok_again",
    "wake_by_enable": "suspend.enable_while suspend.disable_and_enable_while",
    "wake_by_kick": """
        suspend.kick_while suspend.twice suspend.memory_stays suspend.no_interrupt mq.suspend_all
        suspend.bases_stay resume.kicked_while
    """,
    "lie_suspend": "suspend.stops",
    "lie_resume": """
        resume.continues resume.what_waited resume.many resume.twice data.after_suspend interrupts.after_resume
    """,
    "lie_persist": "maps.persist",
    "lie_desc_asid": "desc.apart",
    "lie_enable": "queues.enable_after_driver_ok queues.enable_one_by_one",
    "base_off": "suspend.base_idle queues.base_kept suspend.continue_elsewhere",
    "base_moves": "suspend.bases_stay",
    "early": "queues.before_driver_ok resume.before_driver_ok",
    "no_features_ok": """
        status.features_ok status.features_changed status.other_features status.no_bit_cleared
        config.before_features status.without_owner reset.features_forgotten
    """,
    "no_driver_ok": "status.driver_ok status.no_driver_ok_cleared config.while_running",
    "features_move": "identity.features_stay",
    "config_moves": "config.parts config.again config.survives_reset config.while_suspended",
    "bad_group": "groups.below_number desc.below_number",
    "num_ignored": "queues.size_each queues.num_default_forgotten",
    "addr_kept": "reset.many left.started_often",
    "event_ignored": "rings.event_kick rings.event_wanted rings.event_within rings.event_every_third rings.event_wrap",
    "indirect_first": "rings.indirect_many rings.indirect_and_direct",
    "chain_first": "rings.header_split rings.many_parts rings.any_head rings.two_parts",
    "used_twice": "rings.used_head",
    "size_beyond": "identity.vring_size",
    "stall": """
        rings.one_kick rings.used_wrap control.no_room control.not_negotiated data.small_buffer robust.needs_reset_stops
        status.written_again status.no_needs_reset queues.size_largest queues.base_start queues.base_wrap
        queues.any_order queues.enable_twice queues.kick_pending queues.kick_replaced queues.kick_many queues.doorbell
        queues.other_queues_untouched queues.addr_running queues.base_running groups.bind_running maps.one_update
        maps.batched maps.map_while_running maps.map_under_load maps.again_after_reset suspend.before_driver_ok
        suspend.reset_ends_it suspend.nothing_lost resume.running interrupts.unbound interrupts.never_bound
        interrupts.old_one_rests interrupts.full_eventfd rings.next_ignored rings.full rings.indirect_one
        data.sent_stays data.driver_area data.no_buffer data.foreign_address left.close_running
        data.beside_buffers interrupts.none_without_work mq.one_at_first resume.runs_again
    """,
    "device_id_0": "identity.device_id",
    "one_queue": "identity.vqs_count config.max_pairs",
    "odd_ring": "identity.vring_num",
    "no_range": "identity.iova_range",
    "no_group": "identity.group_num",
    "drifting": "identity.numbers_stay",
    "legacy": "identity.version_1",
    "no_cvq": "identity.feature_needs",
    "no_asid": "identity.backend_bits",
    "resume_alone": "identity.resume_needs_suspend",
    "status_1": "identity.status_zero",
    "backend_taken": "identity.backend_refused desc.needs_asid",
    "owner_taken": "identity.owner_once",
    "queues_taken": """
        identity.owner_needed identity.owner_forgotten queues.num_power_of_two queues.index queues.base_16_bits
        queues.addr_alignment queues.bad_eventfd left.other_process
    """,
    "requests_taken": "identity.no_dirty_log identity.null_pointer queues.addr_flags",
    "config_taken": "config.beyond_end config.no_length config.write_beyond_end",
    "config_zero": "config.mtu config.max_pairs",
    "config_ones": "config.mac config.max_pairs",
    "config_small": "config.size",
    "config_refused": "config.whole",
    "features_taken": "status.features_late suspend.features_while reset.features_forgotten",
    "status_taken": "status.no_bit_cleared status.no_driver_ok_cleared",
    "status_ignored": "status.failed reset.stops reset.no_interrupt config_irq.none_after_reset status.acknowledge",
    "groups_taken": "groups.asid_range groups.group_range",
    "groups_refused": "groups.bind_each",
    "groups_drift": "groups.same_again",
    "messages_taken": """
        iotlb.overlap_same iotlb.overlap_part iotlb.size_zero iotlb.wraparound iotlb.unmap_unused_space
        iotlb.space_range iotlb.spaces_apart iotlb.asid_ignored iotlb.version_1_message iotlb.batch_other_space
        iotlb.batch_over_reset iotlb.bad_type iotlb.no_owner iotlb.survives_reset iotlb.unmap_nothing
    """,
    "messages_refused": """
        iotlb.update iotlb.adjacent iotlb.read_only iotlb.unmap_and_map iotlb.unmap_all iotlb.batch
        iotlb.batch_twice iotlb.batch_end_alone iotlb.in_every_state iotlb.pinned left.maps_gone
        left.close_in_a_batch
    """,
    "suspend_refused": "suspend.call_while suspend.before_driver_ok",
    "call_ignored": "interrupts.set_while_running resume.new_call",
    "kick_ignored": "queues.kick_replaced",
    "config_call_taken": "config_irq.bad_eventfd",
    "config_call_ignored": "config_irq.replaced",
    "config_call_refused": "config_irq.eventfd config_irq.none_after_reset",
    "doorbell_dead": "queues.doorbell",
    "call_refused": "suspend.call_while",
    "addr_refused": "suspend.addr_while",
    "close_ignored": "left.nothing_written left.unpinned interrupts.none_after_close",
    "not_ready": "queues.not_enabled queues.receive_not_enabled control.not_enabled",
    "rings_in_1": "desc.wrong_space",
    "kick_kept": "queues.kick_unbound",
    "config_call_kept": "config_irq.unset_rests",
}
CAUGHT: dict[str, tuple[str, ...]] = {name: tuple(rules.split()) for name, rules in _CAUGHT.items()}
"""By fault, the rules that it makes fail."""

NOTICED: dict[str, tuple[str, ...]] = {
    "call_always": ("interrupts.none_without_work",),
    "write_beyond": ("data.beside_buffers",),
    "cvq_len": ("control.answer_length",),
    "cvq_long": ("control.answer_room",),
    "all_pairs": ("mq.one_at_first",),
}
"""By what a device may do and should not, the rules that see it, and say `unknown`."""


_CORE = "vhost-vdpa's own code answers, and the rule does not go through the door"
_SHOULD = "a SHOULD, or left open by the specification: unknown at worst"
_LACKS = "needs a parent that does not offer it"
_DISK = "vdpa_sim_blk has no fault switches"

UNBROKEN: dict[str, str] = {
    "identity.open_once": _CORE,
    "queues.doorbell_form": _CORE,
    "identity.access_platform": _SHOULD,
    "status.required_features": _SHOULD,
    "control.mac_not_negotiated": _SHOULD,
    "interrupts.suppressed": _SHOULD,
    "rings.event_not_wanted": _SHOULD,
    "resume.other_rings": _SHOULD,
    "desc.same_for_data": _SHOULD,
    "desc.refused": _LACKS,
    "suspend.not_offered": _LACKS,
    "resume.not_offered": _LACKS,
    "suspend.base_while": _SHOULD,
    "queues.num_maximum": _SHOULD,
    "queues.size_smallest": _SHOULD,
    "iotlb.bad_address": _SHOULD,
    "iotlb.limit": _SHOULD,
    "iotlb.outside": "needs a parent with a smaller IOVA range",
    **{rule.id: _DISK for rule in catalogue() if rule.device == BLOCK and rule.id not in {f.rule for f in KNOWN}},
}
"""Rules that nothing here makes fail, and why."""


def rows() -> dict[str, str]:
    """What makes each rule fail, by its id."""
    found = {fault.rule: f"parent {fault.module}: {fault.source}" for fault in KNOWN}
    for name, rules in CAUGHT.items():
        how = f"vdpa_hwsim fault/{FAULTS[name].switch}" if FAULTS[name].switch else f"door {name}"
        found.update(dict.fromkeys(rules, how))
    return {**{name: f"not made to fail: {why}" for name, why in UNBROKEN.items()}, **found}


def text() -> str:
    """The table, one line a rule."""
    return "\n".join(f"{rule:32} {how}" for rule, how in sorted(rows().items()))
