"""The generated modules are what the .proto files say."""

import subprocess
import sys


def test_generated_modules_are_up_to_date():
    result = subprocess.run(
        [sys.executable, "-m", "cluster.server.proto.generate", "--check"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
