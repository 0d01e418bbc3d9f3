"""Recurrent layers, all tasks at once against one by one: the numbers of docs/tasks.md.

python benchmarks/recurrence.py                                every row, a minute on one core
python benchmarks/recurrence.py --compile --rows lstm-32-20    compiled, too: a minute for each row
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import koi
from koi import Koi

Layer = type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]
NUM_TASKS, NUM_STEPS, BATCH = 8, 5, 10
NUM_ITERATIONS = 2  # timed at once


@koi.tensor_task
@dataclass
class NextValue:
    """Read sequences, shape (T, N, 1), and say at each step what follows."""

    x: Tensor
    y: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        return F.mse_loss(model(self.x), self.y)


@dataclass
class Waves:
    """Sines of one frequency to a task, of many phases, seen at ``length`` points."""

    length: int
    dtype: torch.dtype

    def sample(self) -> NextValue:
        points = torch.arange(self.length + 1).view(-1, 1, 1) * (0.1 + torch.rand(()))
        waves = torch.sin(points + 6 * torch.rand(1, BATCH, 1)).to(self.dtype)
        return NextValue(waves[:-1], waves[1:])


class Forecaster(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, layer: Layer, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = layer(1, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x)[0])
        return output


@dataclass(frozen=True)
class Row:
    """What is trained, and by which algorithm."""

    layer: Layer
    hidden: int
    length: int
    algorithm: str = "reptile"
    dtype: torch.dtype = torch.float32

    def title(self) -> str:
        kind, precision = self.layer.__name__, str(self.dtype).removeprefix("torch.")
        return f"{kind}, {self.hidden} units, {self.length} steps, {precision}, {self.algorithm}"


ROWS = {
    "lstm-32-20": Row(nn.LSTM, 32, 20),
    "lstm-32-50": Row(nn.LSTM, 32, 50),
    "lstm-64-50": Row(nn.LSTM, 64, 50),
    "lstm-32-20-maml": Row(nn.LSTM, 32, 20, "maml"),
    "lstm-32-20-float64": Row(nn.LSTM, 32, 20, dtype=torch.float64),
    "gru-32-20": Row(nn.GRU, 32, 20),
    "gru-64-50": Row(nn.GRU, 64, 50),
    "rnn-32-20": Row(nn.RNN, 32, 20),
}
# vectorize and compile of each contestant
FORMS = {"one by one": (False, False), "all at once": (True, False), "compiled": (True, True)}


def training(row: Row, form: str) -> Callable[[], object]:
    """Return a function that trains for some meta-iterations."""
    torch.manual_seed(0)
    vectorize, compile = FORMS[form]
    learner = Koi(
        Forecaster(row.layer, row.hidden).to(row.dtype),
        step_size=0.01,
        num_steps=NUM_STEPS,
        num_iterations=0,
        meta_step_size=0.1,
        meta_batch_size=NUM_TASKS,
        algorithm=row.algorithm,
        vectorize=vectorize,
        compile=compile,
        seed=0,
    )
    tasks = Waves(row.length, row.dtype)

    def train() -> None:
        learner.num_iterations = learner.iteration + NUM_ITERATIONS
        learner.train(tasks, progress=False)

    return train


def measured(row: Row, forms: list[str], repetitions: int) -> list[str]:
    """Return a row of the table: milliseconds of a meta-iteration, and how much faster."""
    timings = harness.by_turns({form: training(row, form) for form in forms}, repetitions)
    cells = [f"{timing.median / NUM_ITERATIONS * 1e3:.1f}" for timing in timings.values()]
    for form in forms[1:]:
        cells.append(str(harness.ratio(timings[forms[0]], timings[form])))
    return [row.title(), *cells]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="measure all at once compiled, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = harness.environment()
    forms = list(FORMS)[: 2 + options.compile]
    rows = []
    for name in options.rows:
        rows.append(measured(ROWS[name], forms, options.repetitions))
        print(*rows[-1], sep=" | ", flush=True)
    facts["load average after"] = harness.load_average()
    head = [
        f"{NUM_TASKS} tasks, {NUM_STEPS} SGD steps of {BATCH} sequences, 1 thread",
        *(f"{form}, ms" for form in forms),
        *(f"{form}: times faster" for form in forms[1:]),
    ]
    print(harness.markdown_table(head, rows))
    print(f"Medians of {options.repetitions} repetitions, by turns; {harness.BRACKETS}.")
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")


if __name__ == "__main__":
    main()
