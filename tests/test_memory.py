"""Memory that is kept for the next meta-iteration."""

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_what_comes_next():
    """Each page that the system maps anew is a fault, of which so many tensors had thousands."""
    code = (
        "import resource, torch\n"
        "from koi.memory import keep_what_is_freed\n"
        "keep_what_is_freed()\n"
        "def work():\n"
        "    tensors = [torch.ones(2**20) for _ in range(20)]\n"
        "for _ in range(3): work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    def faults(**more):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | more
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    assert faults() < 1000
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 10_000  # the user's own wish
