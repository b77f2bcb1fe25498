"""What holds for every test: nothing is fetched, no earlier run's cache is read, CI draws the same examples."""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile
from typing import Any

import pytest
from hypothesis import settings

# Read when LiteLLM, transformers and DSPy are imported, so set before any test module is.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# DSPy answers from its cache on disk what an earlier run was answered; a test must not pass because of that.
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="asyndbt-tests-")
atexit.register(shutil.rmtree, os.environ["DSPY_CACHEDIR"], ignore_errors=True)

# A time limit per example fails on a busy machine; the limit per test (pytest-timeout) stays.
settings.register_profile("development", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "development")


def _is_local(family: int, address: Any) -> bool:
    """Whether a socket address stays on this machine."""
    if family == getattr(socket, "AF_UNIX", None):
        return True
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Any:
    """Refuse every connection that would leave this machine, and name its address."""
    patch = pytest.MonkeyPatch()

    def guarded(real: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if not _is_local(self.family, address):
                raise PermissionError(
                    f"a test tried to connect to {address!r}; tests may only connect to this machine"
                )
            return real(self, address)

        return connect

    patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    yield
    patch.undo()
