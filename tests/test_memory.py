"""Memory that is kept for the next meta-iteration."""

import platform

import pytest

import forked

CODE = """\
import ctypes, os, resource, sys, torch
from koi.memory import keep_what_is_freed
for name in ("TRIM", "MMAP"):
    os.environ.pop(f"MALLOC_{name}_THRESHOLD_", None)
if sys.argv[1:]:
    os.environ["MALLOC_TRIM_THRESHOLD_"] = sys.argv[1]
    ctypes.CDLL(None).mallopt(-1, int(sys.argv[1]))  # as glibc does where a process begins
keep_what_is_freed()
def work():
    tensors = [torch.ones(2**20) for _ in range(20)]
for _ in range(3): work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_what_comes_next(tmp_path):
    """Each page that the system maps anew is a fault, of which so many tensors had thousands."""
    script = tmp_path / "script.py"
    script.write_text(CODE, encoding="utf-8")

    def faults(*arguments):
        done = forked.run_script(script, *arguments, cwd=tmp_path, output=tmp_path, variables={})
        return int(done.stdout)

    assert faults() < 1000
    assert faults(131072) > 10_000  # the user's own wish
