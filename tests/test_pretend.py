"""Every test that is marked `cuda`, on a pretended GPU (pretend.py), in a process of its own."""
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.utils.backend_registration

from conftest import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_all_that_waits_for_a_gpu_passes_on_a_pretended_one(tmp_path):
    """None is skipped. That these tests can fail is test_gpu.py's last one's business, and theirs."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch knows no devices written in Python")
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretend", "-p", "no:cacheprovider", "-m", "cuda",
               "--basetemp", str(tmp_path / "there"), *map(str, marked)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-1000:]
    passed = re.fullmatch(r"(\d+) passed, \d+ deselected in .*", ended.stdout.splitlines()[-1])
    assert passed and int(passed[1]) >= len(marked) > 5, "none fails, none is skipped"
