"""The work that speed.py times: the paper's two nets, by hand and by Koi, on any device."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import by_hand
import torch
from torch import Tensor
from torch.nn import functional as F

from koi import Koi, SupervisedTask, linear
from koi.models import omniglot_net, sine_mlp
from koi.problems import Sines


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed: ``run(n)`` does n meta-iterations, or evaluates n tasks, ``least`` or more."""

    run: Callable[[int], object]
    least: int = 1


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
    """Tasks of random images of 5 classes: the sizes of Omniglot's episodes, not its content."""

    def __init__(self, num_support: int = 50, num_query: int = 5, batch_size: int = 10) -> None:
        self.num_support, self.num_query, self.batch_size = num_support, num_query, batch_size

    def sample_batch(self, num_tasks: int) -> SupervisedTask:
        support, query = (num_tasks, self.num_support), (num_tasks, self.num_query)
        return SupervisedTask(
            support_inputs=torch.rand(*support, 1, 28, 28),
            support_targets=torch.randint(5, support),
            query_inputs=torch.rand(*query, 1, 28, 28),
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


def images_by_hand(device: str) -> Work:
    """5 Adam steps of 10 images at 0.001 on each of 5 tasks, one after the other."""
    model, batches = omniglot_net(5).to(device), batches_on(by_hand.image_batches, device)
    return Work(lambda n: by_hand.reptile(model, batches, F.cross_entropy, adam, n, 5, 1.0))


def images_by_koi(form: str, device: str, autocast: torch.dtype | None = None) -> Work:
    """The same, by Koi in one of its forms; the second moment is carried, as in the paper."""
    return training(image_koi(form, device, autocast=autocast), placed(RandomImages(), device))


def image_koi(form: str, device: str, num_tasks: int = 5, **settings: Any) -> Koi:
    """A learner of the image tasks."""
    vectorize, compile = FORMS[form]
    return Koi(
        omniglot_net(5).to(device),
        step_size=0.001,
        num_steps=5,
        num_iterations=1,
        meta_step_size=linear(1.0, 0.0),
        meta_batch_size=num_tasks,
        inner_optimizer=adam,
        vectorize=vectorize,
        compile=compile,
        **settings,
    )


def evaluation(form: str, device: str, chunk_size: int) -> Work:
    """Evaluation of 5-way 1-shot tasks: 50 steps of batch 5, the query loss after every step."""
    koi = image_koi(form, device, chunk_size=chunk_size)
    tasks = placed(RandomImages(num_support=5, num_query=5, batch_size=5), device)
    return Work(lambda n: koi.evaluate(tasks, num_tasks=n, num_steps=50), least=chunk_size)


def training(koi: Koi, tasks: Any) -> Work:
    """``train`` as a user calls it, with all that belongs to it, for more meta-iterations."""

    def train(num_iterations: int) -> None:
        koi.num_iterations = koi.iteration + num_iterations
        koi.train(tasks, progress=False)

    return Work(train)
