"""Certificates for tests, made by openssl: an authority, and a host's certificate of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvhostvdpa.migration.endpoint import Tls

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True)


def authority(folder: Path, name: str = "ca") -> Path:
    """Make an authority; its certificate."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subject = ("-subj", f"/CN={name}", "-days", "2")
    _openssl("req", "-x509", *_KEY, *subject, "-keyout", str(key), "-out", str(certificate))
    return certificate


def issue(ca: Path, host: str, alternatives: str = "", days: int = 2) -> Tls:
    """Make a certificate for a host, known also by ``alternatives`` (``DNS:x,IP:y``)."""
    folder = ca.parent
    certificate, key, request = (folder / f"{ca.stem}-{host}.{end}" for end in ("pem", "key", "csr"))
    extensions = folder / f"{host}.ext"
    extensions.write_text(f"subjectAltName={alternatives or f'DNS:{host}'}")
    _openssl("req", *_KEY, "-subj", f"/CN={host}", "-keyout", str(key), "-out", str(request))
    signed = ("-CA", str(ca), "-CAkey", str(ca.with_suffix(".key")), "-days", str(days), "-extfile", str(extensions))
    _openssl("x509", "-req", "-in", str(request), *signed, "-out", str(certificate))
    return Tls(str(certificate), str(key), str(ca))
