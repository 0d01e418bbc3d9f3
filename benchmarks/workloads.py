"""The work that speed.py times: the paper's two nets, by hand and by Koi, on any device."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import by_hand
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koi import Koi, SupervisedTask, linear
from koi.models import mini_imagenet_net, omniglot_net, sine_mlp
from koi.problems import Sines


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed: ``run(n)`` does n meta-iterations, or evaluates n tasks, ``least`` or more.

    Args:
        run: the work.
        least: the fewest that it can do.
        threads: how many torch may use; None: it is done elsewhere.
    """

    run: Callable[[int], object]
    least: int = 1
    threads: int | None = None


# Koi's forms, as the arguments vectorize and compile.
FORMS = {
    "eager": (False, False),
    "vectorized": (True, False),
    "compiled": (False, True),
    "vectorized+compiled": (True, True),
}


def adam(params: Any, lr: float = 0.001) -> torch.optim.Adam:
    """The paper's inner optimizer on images: Adam without its first moment."""
    return torch.optim.Adam(params, lr, betas=(0.0, 0.999))


class RandomImages:
    """Tasks of random numbers and 5 classes: the sizes of Omniglot's episodes, not its content."""

    def __init__(
        self,
        num_support: int = 50,
        num_query: int = 5,
        batch_size: int = 10,
        shape: tuple[int, ...] = (1, 28, 28),
    ) -> None:
        self.num_support, self.num_query, self.batch_size = num_support, num_query, batch_size
        self.shape = shape

    def sample_batch(self, num_tasks: int) -> SupervisedTask:
        support, query = (num_tasks, self.num_support), (num_tasks, self.num_query)
        return SupervisedTask(
            support_inputs=torch.rand(*support, *self.shape),
            support_targets=torch.randint(5, support),
            query_inputs=torch.rand(*query, *self.shape),
            query_targets=torch.randint(5, query),
            key=torch.randint(2**62, (num_tasks,)),
            criterion=F.cross_entropy,
            batch_size=self.batch_size,
        )


class OnDevice:
    """A task distribution whose tasks are moved to a device."""

    def __init__(self, tasks: Any, device: str) -> None:
        self.tasks, self.device = tasks, device

    def sample_batch(self, num_tasks: int) -> SupervisedTask:
        task = self.tasks.sample_batch(num_tasks)
        tensors = {n: v.to(self.device) for n, v in vars(task).items() if isinstance(v, Tensor)}
        return dataclasses.replace(task, **tensors)


def placed(tasks: Any, device: str) -> Any:
    """The task distribution on the device; on the CPU itself."""
    return tasks if device == "cpu" else OnDevice(tasks, device)


def batches_on(batches: Callable[[], by_hand.Batches], device: str) -> Callable[..., Any]:
    """The minibatches of the loop by hand on the device; on the CPU themselves."""
    if device == "cpu":
        return batches

    def moved() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in batches():
            yield inputs.to(device), targets.to(device)

    return moved


def sine_by_hand(num_tasks: int, device: str) -> Work:
    """5 SGD steps of 10 points at 0.02 on each of ``num_tasks`` waves, one after the other."""
    model, batches = sine_mlp().to(device), batches_on(by_hand.sine_batches, device)
    optimizer = partial(torch.optim.SGD, lr=0.02)
    return Work(lambda n: by_hand.reptile(model, batches, F.mse_loss, optimizer, n, num_tasks, 0.1))


def sine_by_koi(num_tasks: int, form: str, device: str) -> Work:
    """The same, by Koi in one of its forms."""
    vectorize, compile = FORMS[form]
    return training(
        Koi(
            sine_mlp().to(device),
            step_size=0.02,
            num_steps=5,
            num_iterations=1,
            meta_step_size=linear(0.1, 0.0),
            meta_batch_size=num_tasks,
            vectorize=vectorize,
            compile=compile,
        ),
        placed(Sines(), device),
    )


@dataclasses.dataclass(frozen=True)
class Net:
    """A network that tells 5 classes apart, by 5 inner steps of 10 examples on each task."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_tasks: int
    optimizer: Callable[..., torch.optim.Optimizer]
    step_size: float = 0.001

    def by_hand(self, device: str) -> Work:
        """Train it one task after the other."""
        model = self.make().to(device)
        batches = batches_on(partial(by_hand.random_batches, self.shape), device)
        arguments = model, batches, F.cross_entropy, partial(self.optimizer, lr=self.step_size)
        return Work(lambda n: by_hand.reptile(*arguments, n, self.num_tasks, 1.0))

    def by_koi(self, form: str, device: str, autocast: torch.dtype | None = None) -> Work:
        """Train it by Koi in one of its forms; the second moment is carried, as in the paper."""
        koi = self.koi(form, device, autocast=autocast)
        return training(koi, placed(RandomImages(shape=self.shape), device))

    def koi(self, form: str, device: str, num_tasks: int | None = None, **settings: Any) -> Koi:
        """Return a learner of it."""
        vectorize, compile = FORMS[form]
        return Koi(
            self.make().to(device),
            step_size=self.step_size,
            num_steps=5,
            num_iterations=1,
            meta_step_size=linear(1.0, 0.0),
            meta_batch_size=num_tasks or self.num_tasks,
            inner_optimizer=self.optimizer,
            vectorize=vectorize,
            compile=compile,
            **settings,
        )


class Sequences(nn.Module):
    """Two layers of a transformer's encoder, width 64, and the mean of what they give."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(inputs).mean(-2))
        return scores


class Recurrent(nn.Module):
    """An LSTM of width 64, and what it says at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(inputs)[0][..., -1, :])
        return scores


OMNIGLOT = Net(partial(omniglot_net, 5), (1, 28, 28), 5, adam)
NETS = {
    "omniglot": OMNIGLOT,
    "transformer": Net(Sequences, (16, 64), 8, torch.optim.SGD, 0.02),
    "lstm": Net(Recurrent, (32, 8), 8, torch.optim.SGD, 0.02),
    "mini-imagenet": Net(partial(mini_imagenet_net, 5), (3, 84, 84), 5, adam),
}


def evaluation(form: str, device: str, chunk_size: int) -> Work:
    """Evaluation of 5-way 1-shot tasks: 50 steps of batch 5, the query loss after every step."""
    koi = OMNIGLOT.koi(form, device, chunk_size=chunk_size)
    tasks = placed(RandomImages(num_support=5, num_query=5, batch_size=5), device)
    return Work(lambda n: koi.evaluate(tasks, num_tasks=n, num_steps=50), least=chunk_size)


def training(koi: Koi, tasks: Any) -> Work:
    """``train`` as a user calls it, with all that belongs to it, for more meta-iterations."""

    def train(num_iterations: int) -> None:
        koi.num_iterations = koi.iteration + num_iterations
        koi.train(tasks, progress=False)

    return Work(train)
