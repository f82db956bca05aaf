"""Fixtures. Every test that reaches a kernel takes `backend` and so runs on each of them."""

import os

import pytest
import torch
from helpers import BACKEND_NAMES, use_backend

from bip_fast.commands import environment

try:
    from hypothesis import settings
except ImportError:  # only the property tests need it, and they say so
    pass
else:
    settings.register_profile("bip_fast", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("bip_fast")


THREADS = int(os.environ.get("BIP_FAST_TEST_THREADS", "1"))
MISSING = environment.missing_extras()
collect_ignore = ["experiments", "compare", "commands", "benchmarks"] if MISSING else []


def pytest_report_header():
    """What the packages of the command line would have brought."""
    return f"not collected: {', '.join(collect_ignore)}: need {', '.join(MISSING)}: {environment.INSTALL}" if MISSING else None


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    """Marks as `gpu` what takes the CUDA backend, and as `slow` what looks at a whole comparison, which takes a minute to make; others are
    marked where they are."""
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
        if "cuda" in item.fixturenames or (hasattr(item, "callspec") and item.callspec.params.get("backend") == "cuda"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=BACKEND_NAMES)
def backend(request, monkeypatch):
    """cpu: the C++ kernels. sim: the CUDA kernels on the host simulator. cuda: the CUDA kernels on a GPU."""
    return use_backend(request.param, monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small only wait for threads, and long where cores are shared. ThreadSanitizer wants several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread_again(one_thread):
    """After a test that has asked for more."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def module():
    """The project's kernels on the simulator and on the CPU, as they are compiled: no torch. Orders are put back to the natural one."""
    from sim import build

    module = build.load()
    yield module
    module.sim.set_seed(0)
    module.sim.set_max_grid(4)


@pytest.fixture
def double(monkeypatch):
    """double(kind=Double) lets `GraphedIteration` record on the CPU with a stand-in; returns the recorders it makes."""
    from graph_pairs import Double

    from bip_fast import graphs

    def use(kind=Double):
        Double.made, Double.watched = [], ()
        monkeypatch.setitem(graphs.RECORDERS, "cpu", kind)
        return Double.made

    return use


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of a whole comparison; tests read it and leave it as it is."""
    from compare_runs import cluster, compare, written

    folder = tmp_path_factory.mktemp("compare")
    assert compare(written(folder), folder / "out", "--jobs", "2" if cluster.available() else "1") == 0
    return folder / "out"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Folder of a whole run of `bip-fast prune`; tests read it and leave it as it is."""
    from cli_runs import prune

    out = tmp_path_factory.mktemp("runs") / "whole"
    assert prune(out) == 0
    return out


@pytest.fixture(scope="session")
def digits():
    """The data set, which tests leave as it is."""
    from bip_fast.experiments.data import sources

    return sources.load("digits")
