"""Settings shared by all tests: one thread of chance, the hypothesis profiles, small models."""

from __future__ import annotations

import importlib
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the network for anything

import huggingface_hub
import pytest
import torch
from helpers.hub_server import HubServer, connect
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=5000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish():
    importlib.import_module("helpers.frozen")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def made(monkeypatch):
    """Every cache that `enable` makes; the first one checks the settings."""
    enabling = importlib.import_module("ssd_cache.enabling")
    own, made = enabling.SSDCache, []
    monkeypatch.setattr(enabling, "SSDCache", lambda *args, **kwargs: made.append(own(*args, **kwargs)) or made[-1])
    return made


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub without repositories; huggingface_hub connects to it, keeps its cache in tmp_path, and does not sleep."""
    with HubServer() as hub:
        connect(hub.url, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub
        huggingface_hub.utils.close_session()
