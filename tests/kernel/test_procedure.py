"""Which procedure is chosen for a device, and that the choice is reported."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator

import hwsim
import pytest

from pyvhostvdpa import MissingFeature, VdpaNetDevice
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature

MakeSim = Callable[..., hwsim.HwSim]


@pytest.fixture
def make_sim() -> Iterator[MakeSim]:
    made: list[hwsim.HwSim] = []

    def build(**parameters: object) -> hwsim.HwSim:
        made.append(hwsim.add(f"proc{len(made)}", **parameters))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for sim in made:
        hwsim.remove(sim.name)


def test_a_device_that_can_be_switched_in_place_is(make_sim: MakeSim) -> None:
    with VdpaNetDevice(make_sim().chardev) as device:
        assert (device.procedure.name, device.procedure.why_not_better) == ("in-place", "")


@pytest.mark.parametrize("without", [BackendFeature.RESUME, BackendFeature.DESC_ASID])
def test_device_without_a_feature_gets_the_next_best_procedure(make_sim: MakeSim, without: BackendFeature) -> None:
    with VdpaNetDevice(make_sim().chardev, use=ALL_BACKEND_FEATURES & ~without) as device:
        assert device.procedure.name == "direct"
        assert f"{without.name} is not offered" in device.procedure.why_not_better


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"nas": 1}, "there are 1 address spaces, 2 are needed"),
        ({"desc_asid": "N"}, "DESC_ASID is not offered"),
        ({"resume": "N"}, "RESUME is not offered"),
    ],
    ids=["one address space", "no descriptor group", "no RESUME"],
)
def test_missing_device_feature_decides_the_procedure_and_is_named(
    make_sim: MakeSim, parameters: dict[str, object], why: str
) -> None:
    with VdpaNetDevice(make_sim(**parameters).chardev) as device:
        assert device.procedure.name == "direct"
        assert why in device.procedure.why_not_better


def test_a_device_without_descriptor_groups_is_started_directly(devices: tuple[str, str]) -> None:
    with VdpaNetDevice(devices[0]) as device:
        assert str(device.procedure).startswith("direct (in-place is not possible: ")


def test_a_procedure_that_a_device_cannot_do_is_refused_with_the_reason(make_sim: MakeSim) -> None:
    sim = make_sim()
    use = ALL_BACKEND_FEATURES & ~BackendFeature.RESUME
    with pytest.raises(MissingFeature, match="RESUME is not offered") as refused:
        VdpaNetDevice(sim.chardev, use=use, procedure="in-place")
    assert "the best that it can do" in refused.value.hint
    with pytest.raises(MissingFeature, match="there is no procedure"):
        VdpaNetDevice(sim.chardev, procedure="fastest")
    with VdpaNetDevice(sim.chardev, procedure="direct") as device:
        assert device.procedure.name == "direct"


def migrated(source: str, destination: str, *options: str) -> dict[str, dict[str, str | None]]:
    command = ("vhost-vdpa", "migrate", source, destination, "--memory", "32M", "--downtime", "10000")
    done = subprocess.run([*command, "--seconds", "1", "--json", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, dict[str, dict[str, str | None]]] = json.loads(done.stdout)
    return report["procedure"]


def test_migrate_uses_the_best_of_each_device_and_reports_it(make_sim: MakeSim) -> None:
    able, unable = make_sim(), make_sim(resume="N")
    told = migrated(able.chardev, unable.chardev)
    assert told["source"] == {"name": "in-place", "why_not_better": None, "shadow": "used-all"}
    assert told["destination"]["name"] == "direct"
    assert "RESUME is not offered" in str(told["destination"]["why_not_better"])


def test_migrate_uses_the_procedure_that_the_option_names(make_sim: MakeSim) -> None:
    told = migrated(make_sim().chardev, make_sim().chardev, "--procedure", "direct")
    assert {each["name"] for each in told.values()} == {"direct"}
