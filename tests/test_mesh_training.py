"""Training on the devices of a mesh, in a process of its own: a process has its devices from the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("tier", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_four_devices(tier):
    options = ["-m", tier, "-n", "0", "-p", "no:cacheprovider", "--tb=short", str(HERE / "four_devices.py")]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    ended = subprocess.run([sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
