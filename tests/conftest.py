"""Fixtures. Every test that reaches a kernel takes `backend` and so runs on each of them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `helpers`, `lockstep` and `sim`, whatever pytest's import mode

from helpers import BACKEND_NAMES, use_backend

try:
    from hypothesis import settings
except ImportError:  # only the property tests need it, and they say so
    pass
else:
    settings.register_profile("bip_fast", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("bip_fast")


@pytest.fixture(params=BACKEND_NAMES)
def backend(request, monkeypatch):
    """cpu: the C++ kernels. sim: the CUDA kernels on the host simulator. cuda: the CUDA kernels on a GPU."""
    return use_backend(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread unless a test asks for more: networks this small only wait for threads, and long where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
