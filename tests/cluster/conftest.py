"""Fixtures of clusters with certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.deployment import TLS, said


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    said(TLS / "make_certificates.sh", folder, "localhost", "127.0.0.1", "::1", "*.example.org")
    return folder
