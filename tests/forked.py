"""Processes forked off one that has imported torch and Koi already, so that they start at once."""

import multiprocessing
import os
import runpy
import sys
import warnings
from typing import NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
# nothing of this folder: the process does not know where that is
CONTEXT.set_forkserver_preload(["koi", "torch.distributed.fsdp"])


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_script(script, *arguments, cwd, output, variables):
    """Run a script as `python -W error` does; ``output``: a folder for what it prints."""
    given = script, arguments, cwd, output, variables
    process = CONTEXT.Process(target=_become, args=given)
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    printed = ((output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return Done(process.exitcode, *printed)


def _become(script, arguments, cwd, output, variables):
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        with (output / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    multiprocessing.set_start_method(None, force=True)  # a script has the usual one
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = [str(script), *map(str, arguments)]
    sys.path.insert(0, str(script.parent))
    warnings.resetwarnings()
    warnings.simplefilter("error")
    # As in pyproject.toml: torch 2.13 warns of itself when `torch.compile` is first called, and of
    # more workers than there are cores.
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    runpy.run_path(str(script), run_name="__main__")
