"""TLS between the two sides: a peer without a valid certificate, or without TLS, is refused with the reason."""

from __future__ import annotations

import dataclasses
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import authority, issue

from pyvhostvdpa.base.errors import MigrationRefused, StreamBroken
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.endpoint import Address, Listener, NoPeer, Tls, connect
from pyvhostvdpa.migration.pages import PageReceiver, PageSender
from pyvhostvdpa.migration.stream import MAGIC, VERSION, Channel, Frame


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def here(ca: Path) -> Tls:
    return issue(ca, "here")


@pytest.fixture(scope="module")
def there(ca: Path) -> Tls:
    return issue(ca, "there", "DNS:localhost,IP:127.0.0.1")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return issue(authority(tmp_path_factory.mktemp("other"), "other"), "stranger", "DNS:localhost,IP:127.0.0.1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Meeting:
    """A listener, what it made of its client, and the channels of both."""

    def __init__(self, tls: Tls | None, client: Callable[[Address], Channel | None]) -> None:
        address = Address("", "127.0.0.1", free_port())
        self.refused: NoPeer | None = None
        self.server: Channel | None = None
        self.client: Channel | None = None
        self.failed: MigrationRefused | None = None
        with Listener(address, tls) as listener:
            thread = threading.Thread(target=self._accept, args=(listener,))
            thread.start()
            try:
                self.client = client(address)
            except MigrationRefused as e:
                self.failed = e
            thread.join()

    def _accept(self, listener: Listener) -> None:
        try:
            self.server = listener.accept(stall=5.0)
        except NoPeer as e:
            self.refused = e

    def close(self) -> None:
        for channel in (self.server, self.client):
            if channel is not None:
                channel.close()


def test_tls_connects_two_sides_with_certificates_of_one_authority(here: Tls, there: Tls) -> None:
    meeting = Meeting(there, lambda address: connect(address, here))
    assert meeting.client is not None
    assert meeting.server is not None
    assert not meeting.client.raw
    payload = os.urandom(300_000)
    sender = threading.Thread(target=meeting.client.send_frame, args=(Frame.DEVICE, payload))
    sender.start()
    assert meeting.server.expect(Frame.DEVICE) == (Frame.DEVICE, payload)
    sender.join()
    meeting.close()


def send_all(memory: GuestMemory, channel: Channel) -> None:
    PageSender(memory, channel).send(PageSet.all(memory))
    channel.send_frame(Frame.FINAL)


def test_guest_memory_arrives_through_tls(here: Tls, there: Tls) -> None:
    meeting = Meeting(there, lambda address: connect(address, here))
    assert meeting.client is not None
    assert meeting.server is not None
    layout = [(DEFAULT_GPA, 3 << 20)]
    with GuestMemory(layout) as ours, GuestMemory(layout) as theirs:
        ours.regions[0].memory.buffer[5000:900_000] = os.urandom(895_000)
        thread = threading.Thread(target=send_all, args=(ours, meeting.client))
        thread.start()
        receiver = PageReceiver(theirs, meeting.server)
        while (header := meeting.server.receive_header()).type != Frame.FINAL:
            receiver.receive(header)
        thread.join()
        assert bytes(ours.regions[0].memory.buffer) == bytes(theirs.regions[0].memory.buffer)
    meeting.close()


def test_a_source_of_another_authority_is_refused(there: Tls, stranger: Tls) -> None:
    meeting = Meeting(there, lambda address: connect(address, dataclasses.replace(stranger, ca=there.ca)))
    assert "certificate is refused" in str(meeting.refused)
    assert "does not know the authority of this side's certificate" in str(meeting.failed)


def test_a_destination_of_another_authority_is_refused(here: Tls, stranger: Tls) -> None:
    meeting = Meeting(stranger, lambda address: connect(address, here))
    assert "certificate is refused" in str(meeting.failed)
    assert "does not know the authority" in str(meeting.refused)


def test_a_destination_with_another_hosts_certificate_is_refused(here: Tls, there: Tls) -> None:
    meeting = Meeting(here, lambda address: connect(address, there))
    assert meeting.failed is not None
    assert "certificate is refused: IP address mismatch" in str(meeting.failed)


def test_a_source_without_a_certificate_is_refused(there: Tls) -> None:
    def client(address: Address) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(there.ca)
        with (
            socket.create_connection((address.host, address.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            try:
                sock.recv(1)
            except ssl.SSLError:
                return

    meeting = Meeting(there, client)
    assert meeting.refused is not None
    assert "showed no certificate" in str(meeting.refused)


def test_a_source_in_plain_is_refused(there: Tls) -> None:
    meeting = Meeting(there, lambda address: connect(address, None))
    assert meeting.refused is not None
    assert "does not speak TLS" in str(meeting.refused)
    assert meeting.failed is not None
    assert "both with TLS or both without" in meeting.failed.hint or "no migration stream" in str(meeting.failed)


def test_a_destination_in_plain_is_refused(here: Tls) -> None:
    meeting = Meeting(None, lambda address: connect(address, here))
    assert meeting.failed is not None
    assert "does not speak TLS" in str(meeting.failed)


def saying(tls: Tls, data: bytes) -> Callable[[Address], None]:
    """A source with a right certificate that says something else."""

    def client(address: Address) -> None:
        context = tls.context(server=False)
        with (
            socket.create_connection((address.host, address.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(data)
            sock.recv(16)

    return client


def test_another_version_inside_tls_is_refused(here: Tls, there: Tls) -> None:
    meeting = Meeting(there, saying(here, struct.pack("<8sII", MAGIC, VERSION + 1, 0)))
    assert f"speaks version {VERSION + 1}" in str(meeting.refused)


def test_junk_inside_tls_is_refused(here: Tls, there: Tls) -> None:
    meeting = Meeting(there, saying(here, b"junk" * 100))
    assert "no migration stream" in str(meeting.refused)


def test_client_that_leaves_before_tls_begins_is_not_a_peer(there: Tls) -> None:
    address = Address("", "127.0.0.1", free_port())
    with Listener(address, there) as listener:
        with socket.create_connection((address.host, address.port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with pytest.raises(NoPeer, match="closed the connection"):
            listener.accept()


def test_tls_channel_is_torn_after_a_record_that_could_not_be_sent(here: Tls, there: Tls) -> None:
    meeting = Meeting(there, lambda address: connect(address, here))
    assert meeting.client is not None
    channel = meeting.client
    channel.stall = 0.05

    def fill() -> None:
        while True:
            channel.send_frame(Frame.FINAL)

    with pytest.raises(StreamBroken):
        fill()
    assert channel.torn
    meeting.close()


def test_files_that_are_not_certificates_are_reported_before_a_connection(here: Tls, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for tls in (dataclasses.replace(here, cert=str(bad)), dataclasses.replace(here, ca=str(tmp_path / "none"))):
        with pytest.raises(MigrationRefused, match="TLS: cannot use"):
            Listener(Address("", "127.0.0.1", free_port()), tls)
