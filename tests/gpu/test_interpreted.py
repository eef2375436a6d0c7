"""The Triton backend without a GPU: its kernels run in the interpreter, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
@pytest.mark.slow
def test_steps_keep_their_promises_in_the_interpreter():
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
