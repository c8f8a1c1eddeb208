"""A long run holds no more files and threads at its end than at its beginning, and little more memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import soak
with tempfile.TemporaryDirectory() as folder:
    slopes = soak.soak(1500, 500, Path(folder))
print(json.dumps(slopes))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_run_of_1500_steps():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    slopes = json.loads(done.stdout.splitlines()[-1])
    assert slopes["open files"][0] < 1, "per 1,000 steps"
    assert slopes["threads"][0] < 1
    assert slopes["KiB"][0] < 20_000


def test_the_slope_and_its_error_are_those_of_a_regression(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import numpy as np
    from soak import slope

    xs, ys = [0.0, 1.0, 2.0, 3.0, 5.0], [1.0, 2.5, 2.0, 4.0, 4.5]
    line, covariance = np.polyfit(xs, ys, 1, cov=True)
    assert slope(xs, ys) == pytest.approx((line[0], np.sqrt(covariance[0, 0])))
