"""Faults, tried and counted: ``python tests/faults.py``, or ``make faults``.

Each function makes one kind of fault happen so many times, at moments and places that differ from
run to run, and returns how often something was lost: a φ, a checkpoint, a line of the log, or the
end result, which must be that of a training to which nothing happened. Words after the command
choose rows, as in ``python tests/faults.py kill Ctrl-C``. `test_faults.py` does a shorter round.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import faults_from_elsewhere as elsewhere
import mortal_run
import mortal_shards
from faults_among_callbacks import among_callbacks
from faults_in_data import hostile_archives, hostile_pictures
from faults_long import interrupted, killed, same, terminated
from faults_of_the_demo import hostile_connections
from faults_together import in_one_folder, in_two_threads
from koi import CheckpointError, Koi, KoiWarning, NonFiniteError, TaskError, storage
from toys import Begun, Regression, Regressions, small_net, snapshot

_draw = random.SystemRandom()
SETTINGS = {"step_size": 0.05, "num_steps": 2, "num_iterations": 12, "meta_batch_size": 2}


class Run:
    """A training in a folder, in this process, with its last two checkpoints."""

    def __init__(self, folder: Path, **settings) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.koi = Koi(small_net(), **SETTINGS | {"seed": 0} | settings)

    def train(self, tasks=None, callbacks=(), workers=0) -> dict:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KoiWarning)
            tasks = Regressions() if tasks is None else tasks
            options = {"checkpoint_every": 1, "resume": True}
            self.koi.train(tasks, None, callbacks, self.folder, **options, workers=workers)
        return snapshot(self.koi.model)


def damaged(times: int, damage: Callable[[bytes, int], bytes]) -> int:
    """Damage the newest checkpoint at places spread over it; the one before must be taken."""
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        end = Run(folder).train()
        newest = folder / "iteration-000000012.safetensors"
        content = newest.read_bytes()
        for number in range(times):
            newest.write_bytes(damage(content, number * len(content) // times))
            try:
                storage.read(newest)
                lost += 1  # nobody noticed
            except CheckpointError as error:
                lost += str(newest) not in str(error)
            if number % 20 == 0:
                lost += not same(Run(folder).train(), end)
    return lost


def cut(times: int) -> int:
    """A checkpoint cut anywhere."""
    return damaged(times, lambda content, place: content[:place])


def flipped(times: int) -> int:
    """A checkpoint with one bit flipped anywhere."""

    def flip(content: bytes, place: int) -> bytes:
        bit = 1 << _draw.randrange(8)
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]

    return damaged(times, flip)


def in_a_folder(times: int, fault: Callable[[Path, int], Callable[[], None]]) -> int:
    """Let a folder fail while a training runs; it stops with the reason, φ whole, and goes on."""
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        end = Run(Path(name) / "whole").train()
        for number in range(times):
            folder, at = Path(name) / str(number), _draw.randrange(10)
            run, undo, phi = Run(folder), [], {}

            def callback(koi, record, folder=folder, at=at, undo=undo, phi=phi, number=number):
                phi.update(snapshot(koi.model))
                if record.iteration == at and not undo:
                    undo.append(fault(folder, number))

            said = "nothing"
            try:
                run.train(callbacks=[callback])
            except CheckpointError as error:
                said = str(error)
            finally:
                for function in undo:
                    function()
            wrong = {
                f"it said {said!r}": "cannot be written" not in said,
                "another φ": not same(snapshot(run.koi.model), phi),
                f"it is at {run.koi.iteration}": run.koi.iteration != at + 1,
                "a file half written": bool(list(folder.glob(".*.tmp"))),
                "a checkpoint": any(unreadable(path) for path in folder.glob("*.safetensors")),
            }
            wrong["another end"] = not same(run.train(), end)
            lost += told(f"{fault.__name__} {number} at {at}", wrong)
    return lost


def told(when: str, wrong: dict[str, bool]) -> int:
    """Return how much was lost, having said what."""
    lost = [what for what, is_so in wrong.items() if is_so]
    if lost:
        print(f"{when}: {', '.join(lost)}", file=sys.stderr, flush=True)
    return len(lost)


def unreadable(path: Path) -> bool:
    try:
        storage.read(path)
    except CheckpointError:
        return True
    return False


def full_disk(times: int) -> int:
    """A disk that is full after some bytes of a checkpoint."""

    def fill(folder: Path, number: int) -> Callable[[], None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # fewer than the first checkpoint has, which is the smallest
        resource.setrlimit(resource.RLIMIT_FSIZE, (_draw.randrange(1, 2800), hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return in_a_folder(times, fill)


def vanishing_folder(times: int) -> int:
    """A folder that is moved away, and comes back."""

    def move(folder: Path, number: int) -> Callable[[], None]:
        elsewhere = folder.with_name(f"away-{number}")
        folder.rename(elsewhere)
        return lambda: elsewhere.rename(folder)

    return in_a_folder(times, move)


def read_only_folder(times: int) -> int:
    """A folder in which nothing can be written any more: something else stands in its place."""

    def block(folder: Path, number: int) -> Callable[[], None]:
        elsewhere = folder.with_name(f"away-{number}")
        folder.rename(elsewhere)
        folder.write_text("no folder")

        def undo() -> None:
            folder.unlink()
            elsewhere.rename(folder)

        return undo

    return in_a_folder(times, block)


class Bad(Regressions):
    """One of the losses goes wrong, once."""

    def __init__(self, at: int, trouble: Callable[[], float]) -> None:
        super().__init__()
        self.left, self.trouble = at, trouble

    def sample(self):
        task = super().sample()
        return BadTask(task.inputs, task.targets, self)


class BadTask(Regression):
    def __init__(self, inputs, targets, tasks) -> None:
        super().__init__(inputs, targets)
        self.tasks = tasks

    def loss(self, model):
        self.tasks.left -= 1
        wrong = self.tasks.trouble() if self.tasks.left == 0 else 0.0
        return super().loss(model) + wrong


def in_a_task(times: int, trouble: Callable[[], float], kind: type[Exception]) -> int:
    """Let a loss go wrong at a random step; φ stays, and the training goes on from there."""
    lost = 0
    losses = SETTINGS["num_iterations"] * SETTINGS["meta_batch_size"] * SETTINGS["num_steps"]
    with tempfile.TemporaryDirectory() as name:
        end = Run(Path(name) / "whole").train()
        for number in range(times):
            run, phi = Run(Path(name) / str(number)), {}
            phi.update(snapshot(run.koi.model))
            look = lambda koi, record, phi=phi: phi.update(snapshot(koi.model))  # noqa: E731
            try:
                run.train(Bad(_draw.randint(1, losses), trouble), [look])
                lost += 1
            except kind:
                lost += not same(snapshot(run.koi.model), phi)
            lost += not same(run.train(), end)
    return lost


def nan_task(times: int) -> int:
    """A loss that is NaN."""
    return in_a_task(times, lambda: float("nan"), NonFiniteError)


def raising_task(times: int) -> int:
    """A loss that raises."""

    def fail() -> float:
        raise ZeroDivisionError

    return in_a_task(times, fail, ZeroDivisionError)


def dead_worker(times: int) -> int:
    """kill -9 of a worker that draws ahead; the training stops with its name, and goes on."""
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        end = Run(Path(name) / "whole").train()
        for number in range(times):
            run, phi, at = Run(Path(name) / str(number)), {}, _draw.randrange(10)
            killed, workers = [], Begun()

            def kill(koi, record, at=at, phi=phi, killed=killed, workers=workers):
                phi.update(snapshot(koi.model))
                if record.iteration == at:
                    process = _draw.choice(workers())
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

            try:
                run.train(callbacks=[kill], workers=2)
                lost += at < 6  # its tasks are missing; near the end all may be drawn by then
            except TaskError as error:
                lost += f"worker process {killed[0]}," not in str(error)
            lost += not same(snapshot(run.koi.model), phi) or workers() != []
            lost += not same(run.train(workers=1), end)
    return lost


def torchrun(folder: Path, victim: int, at: int, module=mortal_run, size=2, how=()) -> int:
    """Run the script whose rank dies once; return torchrun's exit code."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command.append("--max-restarts=1")
    script = Path(module.__file__)
    return subprocess.run(
        [sys.executable, "-m", *command, script, folder, str(victim), str(at), *how],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # for a group that the script makes itself
        },
        capture_output=True,
        timeout=300,
        check=False,
    ).returncode


def dead_rank(times: int) -> int:
    """kill -9 of one of torchrun's ranks; --max-restarts brings the job back."""
    lost, end = 0, mortal_run.train(0)
    for number in range(times):
        with tempfile.TemporaryDirectory() as name:
            lost += torchrun(Path(name), number % 2, _draw.randrange(39)) != 0
            koi, tasks = mortal_run.make()
            koi.train(tasks, checkpoint_dir=name, resume=True)
            parts = (end[key] - value for key, value in snapshot(koi.model).items())
            lost += any(part.abs().max() > 1e-5 for part in parts)
            lines = (Path(name) / "metrics.jsonl").read_text().splitlines()
            lost += [json.loads(line)["iteration"] for line in lines] != list(range(40))
    return lost


def dead_shard(times: int, how: str = "dies") -> int:
    """kill -9 of one of the ranks that hold a sharded φ; the job comes back to the same end."""
    lost, end = 0, mortal_shards.alone()
    for number in range(times):
        with tempfile.TemporaryDirectory() as name:
            at = _draw.randrange(mortal_shards.LENGTH - 1)
            lost += torchrun(Path(name), number % 4, at, mortal_shards, 4, [how]) != 0
            lost += not (Path(name) / "died").exists()
            phi = torch.load(Path(name) / "phi.pt")
            lost += any((end[key] - phi[key]).abs().max() > 1e-5 for key in end)
    return lost


def failing_shard(times: int) -> int:
    """An exception in a loss on one of these ranks alone, for which the others then wait."""
    return dead_shard(times, "raises")


def failing_callback(times: int) -> int:
    """An exception in a callback on one of these ranks alone."""
    return dead_shard(times, "callback")


def cut_link(times: int) -> int | None:
    """A cut link between two nodes; None where network namespaces are not permitted."""
    drill = Path(__file__).parent.parent / "benchmarks" / "two_machines.py"
    codes = []
    for _ in range(times):
        codes.append(
            subprocess.run([sys.executable, drill], capture_output=True, check=False).returncode
        )
    return None if 77 in codes else sum(code != 0 for code in codes)


class Fault(NamedTuple):
    """A fault, and how often it is tried in a full round and in a short one."""

    name: str
    happens: Callable[[int], int | None]
    full: int
    short: int


FAULTS = [
    Fault("kill -9 at a random moment", killed, 100, 2),
    Fault("a storm of SIGTERMs", terminated, 60, 2),
    Fault("a storm of Ctrl-Cs", interrupted, 60, 2),
    Fault("Ctrl-C among the callbacks, at any line", among_callbacks, 300, 5),
    Fault("two processes in one folder", in_one_folder, 20, 1),
    Fault("two trainings in two threads", in_two_threads, 50, 3),
    Fault("checkpoint cut anywhere", cut, 3000, 200),
    Fault("checkpoint with a flipped bit", flipped, 3000, 200),
    Fault("checkpoint with any bytes in it", elsewhere.fuzzed_files, 1000, 50),
    Fault("forged checkpoint", elsewhere.forged_checkpoints, 1000, 10),
    Fault("forged classifier", elsewhere.forged_classifiers, 300, 20),
    Fault("run's files edited by hand", elsewhere.edited_runs, 500, 50),
    Fault("run's measurements edited by hand", elsewhere.edited_lines, 300, 3),
    Fault("hostile archive", hostile_archives, 500, 20),
    Fault("hostile picture", hostile_pictures, 2000, 100),
    Fault("hostile connection to the demo", hostile_connections, 1000, 0),
    Fault("wrong argument of a public callable", elsewhere.wrong_arguments, 3000, 0),
    Fault("disk full in the middle of a checkpoint", full_disk, 100, 10),
    Fault("folder that vanishes", vanishing_folder, 100, 10),
    Fault("folder that cannot be written", read_only_folder, 100, 10),
    Fault("loss that is NaN", nan_task, 100, 10),
    Fault("loss that raises", raising_task, 100, 10),
    Fault("worker that draws ahead dies", dead_worker, 40, 2),
    Fault("rank that dies under torchrun", dead_rank, 4, 0),
    Fault("rank that dies with a shard of φ", dead_shard, 1, 0),
    Fault("loss that raises on one shard of φ alone", failing_shard, 1, 0),
    Fault("callback that raises on one shard alone", failing_callback, 1, 0),
    Fault("link cut between two nodes", cut_link, 1, 0),
]


def main(words: list[str]) -> None:
    """Run the rows in whose names one of the words is; without words, all."""
    torch.set_num_threads(1)
    # which a shell lets its background ignore
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"{'fault':<42}{'seconds':>8}{'tried':>7}{'lost':>6}", flush=True)
    total = 0
    for fault in FAULTS:
        if words and not any(word in fault.name for word in words):
            continue
        began = time.monotonic()
        lost = fault.happens(fault.full)
        total += lost or 0
        shown = "not permitted here" if lost is None else f"{lost:>6}"
        seconds = time.monotonic() - began
        print(f"{fault.name:<42}{seconds:>8.0f}{fault.full:>7}{shown}", flush=True)
    sys.exit(total > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
