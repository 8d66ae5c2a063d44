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
from pyvhostvdpa.memory.guest import HUGE_PAGE
from pyvhostvdpa.memory.iova import IovaAllocator
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.net.features import SUPPORTED, Feature, ring_bits
from pyvhostvdpa.virtqueue import SHADOWED
from pyvhostvdpa.virtqueue.layout import ring_layout
from pyvhostvdpa.virtqueue.serving import RingServer, Serving, ServingOptions
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
        ShadowThreads([cast(RingServer, object())], ServingOptions())


@pytest.mark.parametrize("name", ["base", "served", "attached", "direct", "in_place", "best"])
def test_a_procedure_knows_nothing_of_virtio_net(name: str) -> None:
    tree = ast.parse((PROCEDURES / f"{name}.py").read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert not [module for module in modules if module.split(".")[0] in ("net", "net_kind", "provisioned")]


def test_device_kind_decides_which_queues_one_thread_serves(model: Make) -> None:
    shadows = [model().svq for _ in range(5)]
    for together, threads, expected in ((1, 5, [1] * 5), (2, 5, [2, 2, 1]), (3, 2, [3, 2]), (1, 2, [3, 2])):
        made = ShadowThreads(shadows, ServingOptions(threads), -1, together)
        assert [thread._c.count for thread in made._threads] == expected
        made.stop()


def test_options_by_their_name_of_an_earlier_release_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="RelayOptions is called ServingOptions now"):
        from pyvhostvdpa.virtqueue.serving import RelayOptions  # noqa: PLC0415
    assert RelayOptions is ServingOptions
