"""The rows of speed.py's table, and who takes part in each."""

import atexit
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import scaling
import torch
import workloads
from workloads import FORMS, NETS, Work


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: the fastest of ``ours`` against the fastest of ``against``.

    ``must`` and ``aim`` are for the quotient of their times.
    """

    work: str
    group: str
    ours: tuple[str, ...]
    against: tuple[str, ...]
    must: float
    aim: float


HAND = ("loop by hand",)
ONE_BY_ONE = ("Koi, one by one",)
SINE_JAX = ("JAX, steps scanned", "JAX, steps unrolled")
IMAGE_JAX = ("JAX, tasks and steps unrolled",)
KOI = tuple(f"Koi, {form}" for form in FORMS)
_, VECTORIZED, COMPILED, BOTH = KOI
BFLOAT16 = tuple(f"{form}, bfloat16" for form in KOI)
ROWS = (
    Row("sine net, 25 tasks, vectorised", "sine-25", (VECTORIZED,), HAND, 6, 10),
    Row("sine net, 25 tasks, compiled", "sine-25", (BOTH,), HAND, 40, 60),
    Row("the same against JAX", "sine-25", (BOTH,), SINE_JAX, 1.2, 2),
    Row("sine net, 1 task, compiled", "sine-1", (COMPILED,), HAND, 8, 20),
    Row("the same against JAX", "sine-1", (COMPILED,), SINE_JAX, 1, 1.5),
    Row("Omniglot net, 5 tasks, float32", "omniglot", KOI, HAND, 3, 5),
    Row("the same against JAX", "omniglot", KOI, IMAGE_JAX, 1.3, 2),
    Row("Omniglot net, 5 tasks, bfloat16", "omniglot", BFLOAT16, HAND, 4.5, 8),
    Row("evaluation of 1,000 tasks", "evaluation", KOI[1:], ONE_BY_ONE, 5, 8),
    Row("mini-ImageNet net, 5 tasks, compiled", "mini-imagenet", KOI[2:], HAND, 1.5, 3),
    Row("transformer, 8 tasks", "transformer", KOI[1:], HAND, 3, 6),
    Row("LSTM, 8 tasks", "lstm", KOI, HAND, 2, 4),
)


def sine(num_tasks: int, device: str, threads: int) -> dict[str, Work]:
    forms = ("compiled",) if num_tasks == 1 else ("vectorized", "vectorized+compiled")
    found = {HAND[0]: workloads.sine_by_hand(num_tasks, device)}
    for form in forms:
        found[f"Koi, {form}"] = workloads.sine_by_koi(num_tasks, form, device)
    for name, unrolled in zip(SINE_JAX, (False, True), strict=True):
        settings = {"num_tasks": num_tasks, "unrolled": unrolled}
        found |= in_jax("sine", name, settings, device, threads)
    return found


def net(name: str, device: str, threads: int) -> dict[str, Work]:
    """The loop by hand and every form of Koi on a network; on Omniglot's also JAX and bfloat16."""
    found = {HAND[0]: NETS[name].by_hand(device)}
    found |= {f"Koi, {form}": NETS[name].by_koi(form, device) for form in FORMS}
    if name != "omniglot":
        return found
    if harness.has_bfloat16(device):
        for called, form in zip(BFLOAT16, FORMS, strict=True):
            found[called] = NETS[name].by_koi(form, device, torch.bfloat16)
    else:
        print("this processor has no bfloat16: its row is left out")
    return found | in_jax("images", IMAGE_JAX[0], {}, device, threads)


def evaluation(device: str, threads: int) -> dict[str, Work]:
    """The unit is a task: 1,000 are many of the chunks that Koi takes here."""
    return {
        ONE_BY_ONE[0]: workloads.evaluation("eager", device, 1),
        VECTORIZED: workloads.evaluation("vectorized", device, 5),
        COMPILED: workloads.evaluation("compiled", device, threads),
        BOTH: workloads.evaluation("vectorized+compiled", device, 5),
    }


MakeWork = Callable[[str, int], dict[str, Work]]
GROUPS: dict[str, MakeWork] = {
    "sine-25": partial(sine, 25),
    "sine-1": partial(sine, 1),
    "evaluation": evaluation,
    **{name: partial(net, name) for name in NETS},
}


def contestants(group: str, device: str, threads: Sequence[int]) -> dict[str, Work]:
    """Return all of a group, each with every number of threads."""
    if group == "tasks":
        sizes = scaling.sine_sizes(device)
        return {n: dataclasses.replace(w, threads=threads[-1]) for n, w in sizes.items()}
    found = {}
    for number in threads:
        torch.set_num_threads(number)  # a graph is made for one
        for name, work in GROUPS[group](device, number).items():
            called = f"{name} ({number} thread{'s' * (number > 1)})"
            found[called] = dataclasses.replace(work, threads=number)
    return found


def in_jax(
    kind: str, name: str, settings: dict[str, Any], device: str, threads: int
) -> dict[str, Work]:
    """JAX's contestant, in a process that has so many cores; none where JAX is not installed."""
    if importlib.util.find_spec("jax") is None:
        return {}
    given = json.dumps(settings)
    more = {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "in_jax.py"), kind, given, str(threads)],
        env=os.environ | more,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)

    def run(number: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        print(number, file=process.stdin, flush=True)
        if not process.stdout.readline():
            raise RuntimeError(f"the process of {name} has died")

    return {name: Work(run)}
