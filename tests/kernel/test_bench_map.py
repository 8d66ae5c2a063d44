"""Map benchmarks on real devices: counted, proved, and no number where the device lied."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from hwsim import MakeSim

from pyvhostvdpa import MissingFeature, NotVhostVdpa, VhostVdpa
from pyvhostvdpa.base.errors import NotProved
from pyvhostvdpa.base.uapi import Status
from pyvhostvdpa.bench.map import run
from pyvhostvdpa.bench.memory import Backing, Page, PhysicalLayout
from pyvhostvdpa.bench.plan import MapBenchOptions, Mode

KIB = 1 << 10
SMALL = MapBenchOptions(memory=(64 * KIB, 256 * KIB), regions=(4,), repeat=2)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["vhost-vdpa", "bench", "map", *arguments], capture_output=True, text=True, check=False)


def test_bench_map_times_counts_and_proves_each_combination(make_sim: MakeSim) -> None:
    report = run(make_sim().chardev, SMALL)
    assert [(r.mode, r.point.bytes) for r in report.results] == [(m, b) for b in SMALL.memory for m in Mode]
    assert report.loops
    for r in report.results:
        expected = {Mode.BATCH: 1, Mode.PER_REGION: 4, Mode.UNBATCHED: r.runs}
        assert r.set_maps == expected[r.mode], r
        assert 4 <= r.runs == r.entries <= r.point.bytes // 4096
        assert r.map_ns.median > 0
        assert r.map_ns.repeated == 2


@pytest.mark.parametrize("parameters", [{"persist": "N"}, {"dma_map": "Y"}, {"persist": "N", "clean_map": "N"}])
def test_devices_that_forget_or_map_piece_by_piece_are_measured_too(
    make_sim: MakeSim, parameters: dict[str, object]
) -> None:
    report = run(make_sim(**parameters).chardev, SMALL)
    assert len(report.results) == 6


def test_another_address_space_is_measured_by_its_number(make_sim: MakeSim) -> None:
    sim = make_sim()
    report = run(sim.chardev, MapBenchOptions(memory=(64 * KIB,), regions=(4,), repeat=1, asid=1))
    assert {r.asid for r in report.results} == {1}
    with pytest.raises(MissingFeature, match="the device has 2 address spaces"):
        run(sim.chardev, MapBenchOptions(asid=2))


@pytest.mark.parametrize("layout", PhysicalLayout)
def test_memory_lies_as_it_was_asked_to(make_sim: MakeSim, layout: PhysicalLayout) -> None:
    [r] = run(
        make_sim().chardev, MapBenchOptions((1 << 20,), (2,), layout=layout, modes=(Mode.BATCH,), repeat=1)
    ).results
    if layout is PhysicalLayout.SCATTERED:
        assert r.runs >= 0.9 * 256


def test_large_pages_make_few_runs(make_sim: MakeSim) -> None:
    [r] = run(
        make_sim().chardev, MapBenchOptions((16 << 20,), (1,), page=Page.LARGE, modes=(Mode.BATCH,), repeat=1)
    ).results
    assert 1 <= r.runs <= 8


def test_a_device_on_user_addresses_takes_an_entry_a_region(devices: tuple[str, str]) -> None:
    for r in run(devices[0], SMALL).results:
        assert r.entries == 4
        assert r.set_maps is None


def test_a_pinning_device_takes_private_memory(pinned: tuple[str, str]) -> None:
    options = MapBenchOptions((64 * KIB,), (4,), backing=Backing.PRIVATE, repeat=1)
    assert len(run(pinned[0], options).results) == 3


def test_private_memory_on_user_addresses_ends_in_an_error_and_no_number(devices: tuple[str, str]) -> None:
    done = bench(devices[0], "--memory", "64K", "--regions", "4", "--backing", "private", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "every message was accepted, but the device does not reach" in done.stderr or "did not arrive" in done.stderr
    assert "skips private memory" in done.stderr
    assert "next: vhost-vdpa bench map --backing shared" in done.stderr


@pytest.mark.parametrize("mode", ["batch", "per-region-batch"])
def test_a_batch_that_fails_in_silence_ends_in_an_error_and_no_number(make_sim: MakeSim, mode: str) -> None:
    sim = make_sim()
    # the first is that of the proof's own rings
    sim.write("fault/fail_set_map", 5 if mode == "per-region-batch" else 2)
    done = bench(sim.chardev, "--memory", "64K", "--regions", "4", "--mode", mode, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "every message was accepted, but the device does not reach the page at IOVA" in done.stderr
    assert "fails in silence" in done.stderr
    assert int(sim.read("stats")["set_map_errors"]) == 1


def test_a_map_that_the_parent_refuses_ends_in_an_error_and_no_number(make_sim: MakeSim) -> None:
    sim = make_sim()
    sim.write("fault/fail_set_map", 2)
    done = bench(sim.chardev, "--memory", "64K", "--regions", "4", "--mode", "unbatched", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "IOTLB_UPDATE" in done.stderr
    assert "the parent refused the map" in done.stderr


def test_a_device_that_forgets_against_its_word_ends_in_an_error(make_sim: MakeSim) -> None:
    """Piece by piece: a parent with set_map is handed everything again at the next map."""
    sim = make_sim(dma_map="Y")
    sim.write("fault/lie_persist", 1)
    with pytest.raises(NotProved, match="every message was accepted"):
        run(sim.chardev, MapBenchOptions((64 * KIB,), (4,), repeat=1, modes=(Mode.UNBATCHED,)))


def test_bench_map_reports_points_over_a_limit_and_measures_the_rest(make_sim: MakeSim) -> None:
    done = bench(
        make_sim().chardev, "--layout", "scattered", "--memory", "64K,64M", "--regions", "1", "--repeat", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "not measured: 64M in 1 region: takes about" in done.stderr
    found = json.loads(done.stdout)
    assert {r["bytes"] for r in found["results"]} == {64 * KIB}
    assert [r["bytes"] for r in found["refused"]] == [64 << 20]


NOTHING = {
    "entries": (["--layout", "scattered", "--memory", "64M"], "an address space may have 2048"),
    "memory": (["--memory", "8T"], "available"),
    "pages": (["--page", "1G", "--memory", "1G"], "0 of 1 pages of 1G are free"),
    "memlock": (["--memory", "4M"], "RLIMIT_MEMLOCK is 64 KiB"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_bench_map_sends_no_map_if_nothing_can_be_measured(make_sim: MakeSim, case: str) -> None:
    arguments, why = NOTHING[case]
    sim = make_sim()
    words = ["vhost-vdpa", "bench", "map", sim.chardev, *arguments]
    if case == "memlock":
        drop = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
        words = ["sh", "-c", 'ulimit -l 64; exec "$@"', "sh", *drop, *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert "next: " in done.stderr
    assert sim.read("stats")["set_map"] == "0"


def test_a_picture_and_a_comparison_come_with_the_results(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim()
    options = [sim.chardev, "--memory", "64K,128K,256K", "--regions", "4", "--repeat", "2"]
    first = bench(*options, "--json", "--plot", str(tmp_path / "out.svg"))
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["schema"] == "pyvhostvdpa/bench-map/1"
    assert all(r["proved"] is True for r in found["results"])
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    (tmp_path / "old.json").write_text(first.stdout)
    sim.write("cost/set_map_ns", 50_000_000)
    second = bench(*options, "--compare", str(tmp_path / "old.json"))
    assert second.returncode == 0, second.stderr
    assert "slower than" in second.stdout
    assert "batch, 64K, 4 regions, 4k, contiguous, ASID 0: map takes" in second.stdout


def test_interrupted_it_keeps_what_it_has_and_leaves_the_device_reset(make_sim: MakeSim) -> None:
    sim = make_sim()
    words = ["vhost-vdpa", "bench", "map", sim.chardev, "--json", "--memory", "64K", "--repeat", "100000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not re.search(r"repetition [2-9]", said := process.stderr.readline()):
            assert said, "ended before it was interrupted"
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    found = json.loads(out)
    assert found["partial"] is True
    assert found["results"]
    assert "the device was reset and closed" in said
    assert sim.read("state")["status"] == "0x00"
    with VhostVdpa(sim.chardev) as device:
        assert device.get_status() == Status(0)


def test_bench_map_of_a_path_that_is_not_a_device_is_refused() -> None:
    with pytest.raises(NotVhostVdpa):
        run("/dev/null")
