"""Certificates for tests of HTTPS."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(directory: Path, *options: str) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1: its path, and that of its key.

    Args:
        directory: where to write both.
        options: of ``openssl req``, about the key's password; none by default.
    """
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        [*command.split(), *files, *(options or ["-nodes"])], check=True, capture_output=True
    )
    return str(certificate), str(key)
