"""What the sub-commands refuse, suggest and leave alone, where there is no device."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import certificates
import pytest

from pyvhostvdpa.base.errors import ManagementFailed, MissingFeature, VhostVdpaError
from pyvhostvdpa.base.files import check_writable, replace_file
from pyvhostvdpa.bench import hwsim, plot
from pyvhostvdpa.bench.ladder.run import LadderOptions
from pyvhostvdpa.bench.ladder.stage import Given, Simulated
from pyvhostvdpa.bench.page import ladder as ladder_page
from pyvhostvdpa.cli import main, tracing
from pyvhostvdpa.cli.commands import COMMANDS, full_parser, subparsers
from pyvhostvdpa.cli.dev import _render
from pyvhostvdpa.cli.ladder import _RowProgress
from pyvhostvdpa.cli.table import table
from pyvhostvdpa.cli.units import count, guest_memory, size, stream_rate
from pyvhostvdpa.host import mgmt
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.trace.recorder import Trace

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: str) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


def wrong(capsys: Capture, *arguments: str) -> str:
    """What wrong usage prints: the usage of that sub-command in one line, what is wrong, the next step."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    usage, _, following = said.splitlines()
    assert usage.startswith(f"usage: vhost-vdpa {arguments[0]}")
    assert following.startswith("  next: vhost-vdpa ")
    return said


# -- sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("64Mi", 64 << 20), ("64mib", 64 << 20), ("1.5G", 3 << 29), ("1Ti", 1 << 40), ("512b", 512)]
)
def test_binary_suffixes_are_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["64i", "64x", "Mi", "i", "1_", "9" * 40])
def test_size_with_another_suffix_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        size(text)


@pytest.mark.parametrize("command", [["migrate", "a", "b"], ["send", "a", "--to", "unix:x"], ["ladder"], ["doctor"]])
def test_memory_without_a_unit_suggests_mebibytes(command: list[str], capsys: Capture) -> None:
    assert "did you mean 64M?" in wrong(capsys, *command, "--memory", "64")


def test_a_limit_below_what_a_page_needs_is_refused(capsys: Capture) -> None:
    assert "did you mean 1M?" in wrong(capsys, "send", "a", "--to", "unix:x", "--limit", "1")
    assert stream_rate("64K") == 64 << 10
    assert guest_memory("1M") == 1 << 20
    assert count("1000000000") == 10**9


# -- tables --------------------------------------------------------------------------


def test_columns_of_dashes_are_aligned_to_the_left() -> None:
    assert table(["NAME", "HOLDER"], [["a", "-"], ["b", "-"]]) == "NAME  HOLDER\na     -\nb     -"


def test_a_missing_number_is_aligned_as_a_number() -> None:
    assert table(["n"], [["1,000"], ["-"]]) == "    n\n1,000\n    -"


def test_dev_show_has_the_mac_once_and_no_blank_in_its_keys() -> None:
    config = {"mac": "52:54:91:a1:b2:c1", "link": "up", "max_vq_pairs": 1}
    shown = _render({"name": "vdpa0", "mac": "52:54:91:a1:b2:c1", "chardev": None, "holders": [], "config": config})
    assert shown.count("52:54:91:a1:b2:c1") == 1
    assert "max_vq_pairs  1" in shown
    assert "link" in shown


# -- traces --------------------------------------------------------------------------


def test_a_trace_that_failed_early_leaves_the_old_file(tmp_path: Path, capsys: Capture) -> None:
    old = tmp_path / "old.json"
    old.write_text("what was measured yesterday")
    refused(capsys, "migrate", "/dev/null", "/dev/null", "--trace", str(old))
    assert old.read_text() == "what was measured yesterday"
    new = tmp_path / "new.json"
    refused(capsys, "migrate", "/dev/null", "/dev/null", "--trace", str(new))
    assert not new.exists()


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path, capsys: Capture) -> None:
    for place in (tmp_path, tmp_path / "none" / "trace.json"):
        said = refused(capsys, "migrate", "/dev/null", "/dev/null", "--trace", str(place))
        assert "cannot be written" in said
        assert "--trace" in said


def test_a_trace_of_something_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("old")
    arguments = argparse.Namespace(trace=str(file), trace_format=None)
    with contextlib.suppress(RuntimeError), tracing.writing(arguments) as trace:
        trace.device("a").note("something")
        assert file.read_text() == "old"
        raise RuntimeError
    assert json.loads(file.read_text().splitlines()[0])["schema"]


@pytest.mark.parametrize("command", [["migrate", "a", "b"], ["receive", "a", "--listen", "unix:x"]])
def test_trace_options_without_an_effect_are_wrong_usage(command: list[str], capsys: Capture) -> None:
    assert "--trace-format needs --trace" in wrong(capsys, *command, "--trace-format", "events")
    assert "takes a file" in wrong(capsys, *command, "--trace", "-")
    assert not Path("-").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["send", "a", "--resume", "f", "--memory", "2G"],
        ["send", "a", "--resume", "f", "--spans"],
        ["send", "a", "--resume", "f", "--tls-cert", "c"],
        ["receive", "a", "--take", "f", "--tls-ca", "c"],
        ["receive", "a", "--listen", "fd:9", "--insecure-plain"],
        ["ladder", "--on", "a", "b", "--profile", "none"],
        ["ladder", "--on", "a", "b", "--devices", "1"],
    ],
    ids=lambda words: f"{words[0]} {words[-2]}",
)
def test_an_option_that_would_be_ignored_is_wrong_usage(words: list[str], capsys: Capture) -> None:
    assert "has no effect" in wrong(capsys, *words)


# -- files ---------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    replace_file(file, lambda out: out.write("one"))
    file.chmod(0o640)

    def fails(out: object) -> None:
        out.write("two")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=str(file)):
        replace_file(file, fails)
    assert file.read_text() == "one"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to(file)
    replace_file(tmp_path / "link", lambda out: out.write("three"))
    assert (tmp_path / "link").is_symlink()
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("three", 0o640)
    replace_file("/dev/null", lambda out: out.write("to a device"))
    assert Path("/dev/null").is_char_device()


def test_full_disk_is_reported_with_the_files_name() -> None:
    with pytest.raises(OSError, match="/dev/full") as full:
        replace_file("/dev/full", lambda out: out.write("x"))
    assert full.value.errno == 28


def test_a_picture_onto_a_folder_is_refused_before_anything_is_measured(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "out.svg"
    folder.mkdir()
    with pytest.raises(MissingFeature, match="Is a directory"):
        plot.check_plot(folder)
    check_writable(tmp_path / "new.svg")
    assert not (tmp_path / "new.svg").exists()


def test_a_ladder_that_fails_leaves_no_page(tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, "ladder", "--on", "/dev/null", "/dev/zero", "--report", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    page = tmp_path / "index.html"
    page.write_text("yesterday's")
    ladder_page.prepare(tmp_path)
    assert page.read_text() == "yesterday's"
    page.unlink()
    page.mkdir()
    with pytest.raises(VhostVdpaError, match="cannot be written"):
        ladder_page.prepare(tmp_path)


# -- devices -------------------------------------------------------------------------


def test_missing_devices_of_a_ladder_are_named() -> None:
    with pytest.raises(VhostVdpaError, match="/dev/vhost-vdpa-97: No such file"):
        Given(["/dev/vhost-vdpa-97", "/dev/vhost-vdpa-98"])


@pytest.mark.skipif(hwsim.loaded(), reason="vdpa_hwsim is loaded here")
def test_a_ladder_without_vdpa_hwsim_allocates_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def allocated(*_: object) -> None:
        raise AssertionError("guest memory was allocated")

    monkeypatch.setattr(GuestMemory, "__init__", allocated)
    said = refused(capsys, "ladder", "--memory", "64M", "--charge", "64M")
    assert "vdpa_hwsim is not loaded" in said
    with pytest.raises(MissingFeature, match="is not loaded"):
        Simulated(1, 1, "none", 64 << 20, 64 << 20)
    assert LadderOptions().memory


@pytest.mark.parametrize("name", ["a b", "a/b", "", "-a", ".", "..", "ä", "a\n", " "])
def test_a_name_that_nothing_could_handle_makes_no_device(name: str) -> None:
    with pytest.raises(ManagementFailed, match="not a usable name"):
        mgmt.add_device(name, "vdpasim_net")


def test_a_name_that_can_be_handled_goes_to_the_kernel() -> None:
    # there is no such management device; what counts is that the name was not the reason
    for name in ("vdpa0", "my-nic.1", "eth0_a:b"):
        with pytest.raises(ManagementFailed) as failed:
            mgmt.add_device(name, "none/none")
        assert "usable name" not in str(failed.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["name", "a", "mgmtdev", "b", "mac"], "mac has no value"),
        (["name", "a", "name", "b", "mgmtdev", "c"], "name was given twice"),
        (["name", "a"], "no mgmtdev"),
        (["vdpa9"], "usage: vhost-vdpa dev add name NAME mgmtdev MGMTDEV"),
        (["vdpa9"], "needs a name and a management device"),
    ],
)
def test_dev_add_names_the_wrong_word(words: list[str], said: str, capsys: Capture) -> None:
    assert said in wrong(capsys, "dev", "add", *words)


@pytest.mark.parametrize("command", [["dev", "del"], ["dev", "show"], ["doctor"]])
def test_path_that_is_not_a_device_is_refused_by_the_command(command: list[str], capsys: Capture) -> None:
    assert "/dev/null: not a vhost-vdpa character device" in refused(capsys, *command, "/dev/null")


# -- the other side -------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A certificate, its key and its authority."""
    tls = certificates.issue(certificates.authority(tmp_path), "here")
    return [tls.cert, tls.key, tls.ca]


@pytest.mark.parametrize(("which", "name"), [(0, "certificate"), (1, "key"), (2, "authority")])
def test_a_missing_tls_file_is_named(files: list[str], which: int, name: str, capsys: Capture) -> None:
    files[which] = "/nowhere/x.pem"
    options = zip(("--tls-cert", "--tls-key", "--tls-ca"), files, strict=True)
    said = refused(capsys, "send", "DEV", "--to", "tcp:localhost:1", *(word for pair in options for word in pair))
    assert f"the {name} /nowhere/x.pem: No such file or directory" in said


def test_the_tls_option_that_is_missing_is_named(capsys: Capture) -> None:
    said = refused(capsys, "send", "DEV", "--to", "tcp:h:1", "--tls-cert", "c", "--tls-ca", "a")
    assert "--tls-key is missing" in said
    assert "next: add --tls-key" in said


@contextlib.contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(1)
        yield


def test_send_looks_for_its_listener_before_the_guest_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("the guest was started")

    monkeypatch.setattr("pyvhostvdpa.cli.send.check_devices", lambda paths: None)
    monkeypatch.setattr("pyvhostvdpa.cli.send.Sending.run", started)
    said = refused(capsys, "send", "/dev/null", "--to", f"unix:{tmp_path}/none")
    assert "No such file or directory" in said
    assert f"vhost-vdpa receive DEV --listen unix:{tmp_path}/none" in said
    stale = tmp_path / "stale"
    with listening(stale), pytest.raises(AssertionError, match="the guest was started"):
        main(["send", "/dev/null", "--to", f"unix:{stale}"])
    assert "Connection refused" in refused(capsys, "send", "/dev/null", "--to", f"unix:{stale}")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    said = refused(capsys, "send", "/dev/null", "--to", f"tcp:127.0.0.1:{port}", "--insecure-plain")
    assert "Connection refused" in said


# -- progress ------------------------------------------------------------------------


def test_long_step_of_the_ladder_prints_that_it_is_under_way(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("pyvhostvdpa.cli.ladder._SILENCE", 0.05)
    before = threading.active_count()
    with _RowProgress() as progress:
        progress("baseline: stop (DT2), device 1 of 2")
        time.sleep(0.3)
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("baseline: stop (DT2), device 1 of 2")
    assert len(said) > 2
    assert all("still: baseline: stop (DT2), device 1 of 2, for" in line for line in said[1:])
    assert threading.active_count() == before


def test_a_trace_keeps_what_it_had() -> None:
    assert Trace().events == []


# -- the program itself -----------------------------------------------------------------


def test_without_a_command_the_help_is_printed(capsys: Capture) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == bare
    assert "exit status: 0 done; 1 an error" in bare
    assert "examples:" in bare


def test_the_version_is_printed(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("vhost-vdpa 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_and_its_exit_status(command: str, capsys: Capture) -> None:
    assert main(["help", command]) == 0
    text = capsys.readouterr().out
    assert f"usage: vhost-vdpa {command}" in text
    assert "examples:" in text
    assert "exit status:" in text
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert text.startswith(capsys.readouterr().out.rstrip())


def test_help_of_an_action_and_its_page(capsys: Capture) -> None:
    assert main(["help", "dev", "add"]) == 0
    assert "mgmtdev MGMTDEV" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why", "following"),
    [
        (["dev", "x"], "dev has no sub-command 'x': one of add, del, show", "vhost-vdpa help dev"),
        (["doctor", "K01"], "doctor has no sub-command 'K01': it has none", "vhost-vdpa help doctor"),
        (["errors", "EFAULT"], "topic errors is one page, it has no 'EFAULT'", "vhost-vdpa help errors"),
    ],
)
def test_help_on_a_part_that_has_none_leads_to_the_whole(
    words: list[str], why: str, following: str, capsys: Capture
) -> None:
    said = wrong(capsys, "help", *words)
    assert why in said
    assert said.endswith(f"  next: {following}\n")


@pytest.mark.parametrize(
    "words",
    [["list", "-j"], ["-j", "list"], ["-jp", "li"], ["li", "-pj"], ["--json", "list", "-p"], ["-p", "-j", "lis"]],
)
def test_json_is_asked_for_as_iproute2_users_do(words: list[str], capsys: Capture) -> None:
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "pyvhostvdpa/list/1"


def test_commands_and_actions_can_be_shortened(capsys: Capture) -> None:
    assert main(["-j", "de", "s"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "pyvhostvdpa/dev/1"
    with pytest.raises(SystemExit):
        main(["d", "show"])
    assert "'d' could be doctor or dev" in capsys.readouterr().err


def test_an_unknown_command_names_those_there_are(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["migrat3"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in COMMANDS)


def test_unknown_option_prints_the_usage_of_its_sub_command(capsys: Capture) -> None:
    parsers = subparsers(full_parser())
    words = [[name] for name in parsers if not subparsers(parsers[name])]
    words += [[name, inner] for name, parser in parsers.items() for inner in subparsers(parser)]
    required = {"compat": ["a", "b"], "migrate": ["a", "b"], "report": ["a"], "dev add": ["name"], "dev del": ["a"]}
    required |= {"send": ["a", "--to", "unix:/a"], "receive": ["a", "--listen", "unix:/a"]}
    for command in words:
        name = " ".join(command)
        said = wrong(capsys, *command, *required.get(name, []), "--no-such-option").splitlines()
        assert said[0].startswith(f"usage: vhost-vdpa {name} ")
        assert said[1] == f"vhost-vdpa {name}: unrecognized arguments: --no-such-option"


def test_usage_is_one_line_with_what_is_required(capsys: Capture) -> None:
    said = wrong(capsys, "receive")
    assert said.splitlines()[0] == (
        "usage: vhost-vdpa receive (--listen unix:PATH|tcp:HOST:PORT | --take FILE) [OPTIONS] DEV..."
    )
    assert "the following arguments are required: DEV" in said


def test_help_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if not line.startswith(("usage", "  vhost-vdpa"))) <= 80, command
    assert os.environ["COLUMNS"] == "80"
