"""What `vhost-vdpa send` and `receive` refuse before they look at a device."""

from __future__ import annotations

import pytest

from pyvhostvdpa.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [("send", "DEV", "--to"), ("receive", "DEV", "--listen")], ids=lambda c: c[0])
def test_an_address_has_to_be_one(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    said = refusal(capsys, *command, "host:4444")
    assert "'host:4444' is not a valid address" in said
    assert "next: unix:PATH or tcp:HOST:PORT" in said


@pytest.mark.parametrize("command", [("send", "DEV", "--to"), ("receive", "DEV", "--listen")], ids=lambda c: c[0])
def test_tcp_wants_tls(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    said = refusal(capsys, *command, "tcp:host:4444")
    assert "without TLS would show the guest's memory to the network" in said
    assert "--tls-cert FILE" in said


def test_incomplete_tls_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "send", "DEV", "--to", "tcp:host:4444", "--tls-cert", "x.pem")
    assert "takes all of --tls-cert, --tls-key and --tls-ca" in said


def test_a_saved_guest_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    said = refusal(capsys, "receive", "/dev/null", "--take", f"{tmp_path}/none")
    assert "not a vhost-vdpa character device" in said


def test_either_a_peer_or_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["receive", "DEV"])
    assert wrong.value.code == 2
    assert "--listen" in capsys.readouterr().err


def test_a_stream_that_was_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fd:987 is not a stream" in refusal(capsys, "receive", "DEV", "--listen", "fd:987")
