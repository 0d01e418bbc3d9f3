"""All that a GPU can tell of Koi, in a given time, without anybody watching.

python benchmarks/gpu.py --minutes 10
python benchmarks/gpu.py --minutes 10 --data DATA      Omniglot from there, and no download
python benchmarks/gpu.py --device cpu --quick --out trial

(a) every engine gives what the plain loop on the CPU gives, CUDA graphs included; (b) the speed
table; (c) the paper's omniglot-5way at 100,000 meta-iterations, and then omniglot-20way at 200,000,
as far as the time reaches, each measured on test tasks. Every step is a process with a time limit
of its own, and writes its tables as it goes; report.md, steps.csv and training.csv in the folder
tell of all. The same command again repeats nothing that is done, and goes on with the trainings.
"""

import argparse
import contextlib
import csv
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch

from koi.recipes import RECIPES
from koi.recipes.fewshot import PAPER

HERE = Path(__file__).resolve().parent
SPEED = ["sine-25", "sine-1", "omniglot", "evaluation", "tasks", "memory"]
TRAINED = ["omniglot-5way", "omniglot-20way"]
# Parts of the whole time; what a step does not use is left to those after it.
EQUALITY, EQUALITY_AND_SPEED, TEST = 0.2, 0.5, 0.1
GRACE = 60.0  # seconds for a training to save itself
STEPS = ["step", "how it ended", "seconds", "limit, s", "command"]
TRAINING = [
    *("recipe", "meta-iterations", "of", "ms for each", "shots", "protocol"),
    *("accuracy, %", "95 %", "the paper", "test tasks"),
]
KOI = [sys.executable, "-c", "from koi.lab.cli import main; main()"]
DONE = "done"


@dataclass(frozen=True)
class Step:
    """A process, and the seconds that it may take."""

    name: str
    command: list[str]
    limit: float
    anew: bool = False  # whether it has more to do where it ended well before


def ended(step: Step, log: Path, limit: float) -> str:
    """Run a step until it ends or its time is over; return how it ended."""
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return "stopped at its limit"
        finally:
            stop(process)
    return DONE if code == 0 else f"failed (exit code {code})"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, a training after it has saved itself."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            print(f"process {process.pid} did not end within {GRACE:.0f} s: killed")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers of a compiler outlive it
    process.wait()


def shown(command: Sequence[str]) -> str:
    """A command as one types it, without the places of this machine."""
    text = shlex.join(["koi", *command[3:]] if list(command[:3]) == KOI else command)
    return text.replace(sys.executable, "python").replace(f"{HERE.parent}/", "")


@dataclass
class Session:
    """The folder of the results, and the time that is left."""

    out: Path
    device: str
    total: float
    facts: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    steps: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / "steps.csv").exists():
            with (self.out / "steps.csv").open(encoding="utf-8", newline="") as file:
                self.steps = list(csv.reader(file))[1:]
        self.report()

    @property
    def left(self) -> float:
        return self.total - (time.monotonic() - self.began)

    def run(self, step: Step) -> bool:
        """Run a step that is not done, and tell of it; return whether it is done."""
        command = shown(step.command)
        kept = {row[0]: row for row in self.steps}
        before = kept.get(step.name)
        if before is not None and before[1:5:3] == [DONE, command] and not step.anew:
            return True
        limit = min(step.limit, self.left)
        if limit <= 0:
            print(f"{step.name}: no time left", flush=True)
            return False
        print(f"{step.name}: at most {limit:.0f} s", flush=True)
        began, how = time.monotonic(), "interrupted"
        try:
            how = ended(step, self.out / f"{step.name}.log", limit)
        finally:
            seconds = time.monotonic() - began
            kept[step.name] = [step.name, how, f"{seconds:.0f}", f"{limit:.0f}", command]
            self.steps = list(kept.values())
            self.report()
            print(f"{step.name}: {how} after {seconds:.0f} s", flush=True)
        return how == DONE

    def report(self) -> None:
        """Write all that is known so far."""
        harness.write_csv(self.out / "steps.csv", STEPS, self.steps)
        trained = [row for name in TRAINED for row in training_rows(self.out / name, name)]
        harness.write_csv(self.out / "training.csv", TRAINING, trained)
        parts = [
            "# What a GPU tells of Koi" if self.device == "cuda" else "# A trial on the CPU",
            harness.facts_list(self.facts),
            harness.markdown_table(STEPS, self.steps) if self.steps else "Nothing has ended yet.",
        ]
        if trained:
            parts += ["## Training", harness.markdown_table(TRAINING, trained)]
        for name, *_ in self.steps:
            for page in sorted((self.out / name).glob("*.md")):
                if name not in TRAINED:  # whose folders are runs with model cards
                    parts += [f"## {name}", page.read_text(encoding="utf-8").removeprefix("# ")]
        (self.out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def training_rows(run: Path, name: str) -> Iterator[list[str]]:
    """Rows of what a run was measured to have learned; one without accuracies before that."""
    if not (run / "metrics.jsonl").exists():
        return
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[-1001:-1]]  # the last line may be half a one
    length = f"{RECIPES[name].num_iterations:,}"
    each = statistics.median(r["seconds"] for r in records) if records else float("nan")
    timed = [length, f"{1e3 * each:.2f}"]
    if not (run / "results.json").exists():
        yield [name, f"{len(lines):,}", *timed, "", "not measured yet", "", "", "", ""]
        return
    for shots, found in json.loads((run / "results.json").read_text(encoding="utf-8")).items():
        cells = PAPER[name, int(shots)]
        for way, (paper, interval) in zip(("inductive", "transductive"), cells, strict=True):
            accuracy, own = (100 * value for value in found[way])
            yield [
                *(name, f"{found['iteration']:,}", *timed, shots, way),
                *(f"{accuracy:.2f}", f"± {own:.2f}", f"{paper:.2f} ± {interval:.2f}"),
                f"{found['num_tasks']:,}",
            ]


def measurements(session: Session, quick: bool) -> Iterator[Step]:
    """Steps (a) and (b)."""
    python, device = [sys.executable], ["--device", session.device]
    more = ["--quick"] if quick else []

    def script(file: str, folder: str) -> list[str]:
        return [*python, str(HERE / file), *device, *more, "--out", str(session.out / folder)]

    yield Step("equality", script("equality.py", "equality"), EQUALITY * session.total)
    kept = (1 - EQUALITY_AND_SPEED) * session.total  # for the trainings
    for rows in SPEED[1:2] if quick else SPEED:
        command = [*script("speed.py", f"speed-{rows}"), "--rows", rows]
        if session.device == "cuda" and not quick:
            command += ["--repetitions", "10", "--threads", str(min(8, os.cpu_count() or 1))]
        yield Step(f"speed-{rows}", command, session.left - kept)


def train(session: Session, name: str, data: Path | None, quick: bool) -> bool:
    """Train as long as there is time, then measure what there is; return whether it is whole."""
    run, test_time = session.out / name, TEST * session.total
    command = [*KOI, "train", name, "--out", str(run), "--device", session.device]
    command += ["--validation", "0", "--test-tasks", "0"]  # the paper's protocol: no validation
    command += [] if data is None else ["--data", str(data)]
    command += ["--iterations", "2"] if quick else []
    command += ["--compile"] if session.device == "cuda" else []
    whole = session.run(Step(f"{name}-training", command, session.left - test_time))
    if list(run.glob("checkpoints/*.safetensors")):
        tasks = "2" if quick else "10000" if whole else "1000"
        test = [*KOI, "evaluate", str(run), "--tasks", tasks]
        limit = session.left if whole else test_time
        session.run(Step(f"{name}-test", test, limit, anew=not whole))
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="for all of it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a little of every step")
    parser.add_argument("--data", type=Path, help="where Omniglot is; otherwise it is downloaded")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: give --device cpu --quick to try the steps without")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no process behind
    given = sys.argv[1:] if arguments is None else arguments
    facts = {"command": shlex.join(["python", "benchmarks/gpu.py", *given])}
    total, out = 60 * options.minutes, options.out.resolve()
    session = Session(out, options.device, total, facts | harness.environment())
    for step in measurements(session, options.quick):
        session.run(step)
    data = None if options.data is None else options.data.resolve()
    for name in TRAINED:
        if not train(session, name, data, options.quick):
            break
    print((session.out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
