"""What the tests of several ranks let each of them do."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from engine_toys import NETS, Fit, Fits, everything, trained
from koi import ClientTasks, Koi, ModelError, stack
from toys import InTurn, Point, Quadratic, Regression, Regressions, small_net, snapshot

SETTINGS = {
    "step_size": 0.05,
    "num_steps": 2,
    "num_iterations": 6,
    "meta_step_size": 0.05,
    "meta_batch_size": 5,
}


def in_engine(rank, engine, net, settings):
    """Train in float64, in the engine of this name, without the compiler."""
    make, shape = NETS[net]
    torch.set_default_dtype(torch.float64)
    try:
        with patch("torch.compile", lambda function, **options: function):
            if rank == 0:
                torch.manual_seed(1)  # the others begin elsewhere, and are to take this start
            return everything(trained(engine, make(), Fits(shape), **settings))
    finally:
        torch.set_default_dtype(torch.float32)


def learner(**settings):
    """Return a learner whose model has a buffer and a frozen parameter."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return Koi(model, **SETTINGS | settings)


class Own(Regressions):
    """Draws from a generator of its own, of which Koi knows nothing."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def sample(self):
        return Regression(
            torch.randn(6, 3, generator=self.generator), torch.randn(6, 2, generator=self.generator)
        )


class Counted(Regressions):
    """Keeps a state, and says so."""

    count = 0

    def sample(self):
        self.count += 1
        DRAWN.append(self.count)
        task = super().sample()
        task.targets = task.targets + self.count
        return task

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Noisy(Regression):
    """A loss that draws."""

    def loss(self, model):
        return super().loss(model) + (model(torch.randn(6, 3))).square().mean()


class Noises(Regressions):
    def sample(self):
        task = super().sample()
        return Noisy(task.inputs, task.targets)


class Weighted(Regressions):
    """Weights of 0, 1 and 2."""

    def sample(self):
        task = super().sample()
        task.weight = torch.randint(3, ())
        return task


class Together(Regressions):
    """Draws many at once, and a part of them alone, each from a seed of its own."""

    step = 1

    def sample_batch(self, num_tasks, first=0):
        seed, tasks = torch.initial_seed() % 2**60, []
        for number in range(first, first + self.step * num_tasks, self.step):
            torch.manual_seed(seed + number)
            DRAWN.append(number)
            tasks.append(Fit(torch.randn(6, 3), torch.randn(6, 2)))
        return stack(tasks)


class Wrongly(Together):
    """Means another thing by ``first``."""

    step = 2


class Listed(Regressions):
    """Keeps nothing, and draws from the global generators."""

    def sample(self):
        DRAWN.append(torch.initial_seed())
        return super().sample()


DRAWN = []  # what has been drawn in this process


def drawing(rank, kind):
    """Train in float64; return what was drawn at each meta-iteration but the first, and φ."""
    tasks = {"apart": Listed, "together": Together, "wrongly": Wrongly, "counted": Counted}[kind]()
    drawn = []

    def look(koi, record):
        drawn.append(list(DRAWN))
        DRAWN.clear()

    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        koi = learner(seed=0)
        koi.train(tasks, callbacks=[look])
    finally:
        torch.set_default_dtype(torch.float32)
    return drawn[1:], snapshot(koi.model)


class Client(Regressions):
    """Draws from the data of one client: inputs around a number of its own."""

    def __init__(self, number, generator=None):
        super().__init__()
        self.number, self.generator = number, generator

    def sample(self):
        inputs = self.number + torch.randn(6, 3, generator=self.generator)
        return Regression(inputs, torch.randn(6, 2, generator=self.generator))


class InShares(Regressions):
    """In one process what `koi.ClientTasks` are on three ranks."""

    def __init__(self, koi):
        super().__init__()
        self.koi, self.drawn = koi, 0

    def sample(self):
        number, self.drawn = self.drawn % 5, self.drawn + 1
        return Client([0, 1, 1, 2, 2][number]).sample()


def clients(rank, secret=False):
    """Train in float64 on data that other ranks do not have; rank None: in one process."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        koi = learner(seed=0)
        generator = torch.Generator().manual_seed(0) if secret else None
        tasks = InShares(koi) if rank is None else ClientTasks(Client(rank, generator))
        koi.train(tasks)
    finally:
        torch.set_default_dtype(torch.float32)
    return snapshot(koi.model)


def weighted_clients(rank):
    """Train on data of this rank's own, whose tasks count as many as it has; return φ."""
    clients = [(1.0, 1.0), (-3.0, 4.0)]  # centre and weight of each
    task = Quadratic(torch.tensor([clients[rank][0]], dtype=torch.float64))
    task.weight = clients[rank][1]
    model = Point(5.0).double()
    Koi(model, 0.1, 2, 3, meta_step_size=0.5, meta_batch_size=5).train(ClientTasks(InTurn(task)))
    return model.weight.item()


class Alone(Regression):
    """Adapts by itself, drawing as it goes."""

    def adapt(self, model, num_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(num_steps):
            optimizer.zero_grad()
            (self.loss(model) + model(torch.randn(6, 3)).square().mean()).backward()
            optimizer.step()


class ByThemselves(Regressions):
    def sample(self):
        task = super().sample()
        return Alone(task.inputs, task.targets)


KINDS = {
    "by themselves": ByThemselves,
    "plain": Regressions,
    "own": Own,
    "counted": Counted,
    "noise": Noises,
    "weighted": Weighted,
}


def one_by_one(rank, kind, settings, **options):
    """Train tasks of a kind, and return all that comes of it."""
    koi = learner(vectorize=False, **settings)
    koi.train(KINDS[kind](), **options)
    return {name: t.double() for name, t in snapshot(koi.model).items()}, len(koi.history)


class Count:
    """A callback that keeps a state."""

    count = 0

    def __call__(self, koi, record):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def counting(rank, ranks, num_iterations, folder):
    """Train with a callback on some of the ranks; return what it has counted in the end."""
    callbacks = [Count()] if rank in ranks else []
    koi = learner(seed=0, num_iterations=num_iterations)
    koi.train(Regressions(), callbacks=callbacks, checkpoint_dir=folder, resume=True)
    return [callback.count for callback in callbacks]


def ending(rank, stops, **options):
    """Train until one rank's callback returns STOP at the third; return how far it came, and φ."""
    koi = learner(seed=0)
    callbacks = [lambda koi, record: koi.STOP if rank in stops and koi.iteration == 3 else None]
    koi.train(Regressions(), callbacks=callbacks, **options)
    return koi.iteration, koi.best, {n: t.double() for n, t in snapshot(koi.model).items()}


def validated(rank, folder):
    """Train with validation by a callable that other ranks would not agree with."""
    torch.manual_seed(0)
    value = [5.0, 2.0, 3.0, 4.0, 5.0][rank:] or [1.0]
    koi = learner(seed=0, num_iterations=6)
    koi.train(
        Regressions(),
        validate=lambda koi: value[koi.iteration - 1],
        validate_every=1,
        patience=2,
        checkpoint_dir=folder,
    )
    return koi.iteration, koi.best, {n: t.double() for n, t in snapshot(koi.model).items()}


def stepped(rank):
    torch.manual_seed(0)
    koi, tasks = learner(seed=0, num_iterations=3), Regressions()
    for _ in range(3):
        koi.step(tasks)
    return {n: t.double() for n, t in snapshot(koi.model).items()}


def evaluates_alone(rank):
    """Only one rank measures, between two trainings in which all take part."""
    koi = learner(seed=0)
    koi.train(Regressions())
    if rank == 0:
        koi.evaluate(Regressions(), num_tasks=3)
    koi.num_iterations = 8
    koi.train(Regressions())
    return koi.iteration


def bytes_sent(rank):
    """Return the sizes of all that is reduced, with SGD and with Adam."""
    sizes = []
    real = dist.all_reduce

    def counted(tensor, **options):
        sizes.append(tensor.nbytes)
        return real(tensor, **options)

    with patch("torch.distributed.all_reduce", counted):
        for optimizer in ("sgd", "adam"):
            settings = {**SETTINGS, "num_iterations": 1, "inner_optimizer": optimizer}
            Koi(small_net(), **settings, seed=0).train(Regressions())
    return sizes


def wrapped(rank):
    """Give Koi a model that torch shares out by its own means."""
    try:
        Koi(nn.parallel.DistributedDataParallel(small_net()))
    except ModelError as error:
        return str(error)
    return None
