"""What a procedure knows of the thing that serves a guest's rings."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from ring_model import Model, Segment

import pyvhostvdpa
from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.device.groups import Groups
from pyvhostvdpa.device.procedure.base import Memories, Target
from pyvhostvdpa.device.procedure.direct import Direct
from pyvhostvdpa.memory.guest import HUGE_PAGE, IovaAllocator, SharedMemory
from pyvhostvdpa.net.features import SUPPORTED, Feature, ring_bits
from pyvhostvdpa.virtqueue import SHADOWED
from pyvhostvdpa.virtqueue.layout import ring_layout
from pyvhostvdpa.virtqueue.serving import RelayOptions, RingServer, Serving
from pyvhostvdpa.virtqueue.shadow import ShadowThreads

Make = Callable[..., Model]
PROCEDURES = Path(pyvhostvdpa.__file__).parent / "device" / "procedure"


def target(features: Feature, serving: Serving = SHADOWED) -> Target:
    return Target(
        cast(Any, None), cast(Any, None), features, BackendFeature(0), Groups(1, None, None, None), serving=serving
    )


@pytest.mark.parametrize("name", ["base", "direct", "series"])
def test_a_procedure_names_no_way_of_serving_rings(name: str) -> None:
    tree = ast.parse((PROCEDURES / f"{name}.py").read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module and module.endswith("virtqueue.shadow")]


def test_a_procedure_serves_rings_by_what_its_target_names(model: Make) -> None:
    m = model()
    made: list[tuple[Any, ...]] = []

    def queue(*arguments: Any) -> RingServer:
        made.append(arguments)
        return SHADOWED.queue(*arguments)

    with SharedMemory("own", 2 * HUGE_PAGE) as own:
        procedure = Direct(target(SUPPORTED | Feature.EVENT_IDX, Serving(queue, SHADOWED.threads)))
        procedure._memories = Memories(m.memory, own, IovaAllocator(0, 1 << 40))
        server = procedure._shadow(m.queue)
        assert made == [(m.queue, m.memory, own.hva, ring_bits(Feature.EVENT_IDX), None)]
        assert procedure.shadows == [server]
        procedure._close_queues()
        assert (server.kick, server.call) == (-1, -1)


def test_negotiated_ring_features_reach_the_layout(model: Make) -> None:
    m = model()
    with SharedMemory("own", 2 * HUGE_PAGE) as own:
        procedure = Direct(target(SUPPORTED | Feature.RING_PACKED))
        procedure._memories = Memories(m.memory, own, IovaAllocator(0, 1 << 40))
        with pytest.raises(MissingFeature, match="RING_PACKED"):
            procedure._shadow(m.queue)
    with pytest.raises(MissingFeature, match="RING_PACKED"):
        ring_layout(256, ring_bits(Feature.RING_PACKED))
    assert ring_layout(256, ring_bits(Feature.EVENT_IDX | Feature.INDIRECT_DESC)).num == 256


def test_a_shadow_queue_offers_all_that_a_procedure_asks_for(model: Make) -> None:
    m = model(start_idx=7)
    server: RingServer = m.svq
    m.describe(3, [Segment(m.memory.regions[0].gpa + 0x40000, 8)])
    m.publish(3)
    m.forward()
    assert (server.broken, list(server.in_flight), server.queue) == ("", [3], m.queue)
    assert server.statistics()["forwarded"] == 1
    server.drain()
    assert server.republish() == 7


def test_the_relay_serves_shadow_queues_only() -> None:
    with pytest.raises(TypeError, match="shadow virtqueues only"):
        ShadowThreads([cast(RingServer, object())], RelayOptions())
