"""CPU kernels under every instruction set that this machine has: the same bits, of small steps and of those that write past the caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bip_fast import build_info

pytestmark = pytest.mark.slow

CHILD = Path(__file__).resolve().parents[1] / "shared" / "simd_child.py"
WIDTHS = ["baseline", "avx2", "avx512"]


def states(width: str) -> list[str]:
    """Lines of the child: the width that it had, and digests."""
    environ = {**os.environ, "BIP_FAST_SIMD": width, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, str(CHILD)], env=environ, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def baseline() -> list[str]:
    return states("baseline")


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_every_width_gives_the_bits_of_the_baseline(baseline, width):
    if WIDTHS.index(width) > WIDTHS.index(build_info()["simd"]):
        pytest.skip(f"needs a processor with {width}")
    own = states(width)
    assert (baseline[0], own[0]) == ("baseline", width)
    assert own[1:] == baseline[1:]
    assert len(own) == 11
