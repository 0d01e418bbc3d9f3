"""What the tests of sharded models let each rank do."""

import io
import runpy
import warnings
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from koi import Koi, KoiError
from koi.randomness import mix
from toys import InTurn, Regression, Regressions

SETTINGS = {"step_size": 0.05, "num_steps": 2, "num_iterations": 4, "meta_step_size": 0.3}
CASES = {
    "reptile with Adam": {"inner_optimizer": "adam", "average": 0.5},
    "fomaml": {"algorithm": "fomaml", "clip_meta": 0.05},
    "fomaml with a meta-optimizer": {
        "algorithm": "fomaml",
        "inner_optimizer": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
        "meta_optimizer": lambda params: torch.optim.Adam(params, lr=0.01),
    },
}


def net():
    """Rows that two shards do not share evenly, and buffers."""
    layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
    return nn.Sequential(*layers)


def sharded(model, shards, layers=1):
    """Shard a model, with so many layers by themselves, over groups of so many ranks."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // shards, shards), mesh_dim_names=("tasks", "shards"))
    for layer in (*model[:layers], model):
        fully_shard(layer, mesh=mesh["shards"])
    return model


def learner(case, shards=None, seed=0, **more):
    torch.manual_seed(seed)
    model = net() if shards is None else sharded(net(), shards)
    return Koi(model, **SETTINGS | CASES[case] | {"seed": 0, "meta_batch_size": 3} | more)


def in_float64(function):
    """Let new tensors be of float64 while a function runs."""

    def run(*arguments, **options):
        torch.set_default_dtype(torch.float64)
        try:
            return function(*arguments, **options)
        finally:
            torch.set_default_dtype(torch.float32)

    return run


def whole(model):
    """Return all of a model's parameters and buffers, whatever is sharded gathered."""
    tensors = model.state_dict()
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in tensors.items()
    }


def trained(rank, shards):
    """Train in every way; return φ and the records of each."""
    found = {}
    for case in CASES:
        # the φ of the first group is what counts
        koi = in_float64(learner)(case, shards, seed=rank // (shards or 1))
        in_float64(koi.train)(Regressions())
        found[case] = whole(koi.model), [vars(record) | {"seconds": 0} for record in koi.history]
    return found


def state(koi):
    """Return all that is learned and carried, whatever is sharded gathered."""
    parts = koi.state_dict()
    count = len(parts["params"])  # of moments, not of Adam's step counts
    found = [*parts["moments"][: count * (len(parts["moments"]) // count)]]
    found += parts["mean"]["values"][:count]  # not of buffers
    for own in (parts["meta_state"] or {"state": {}})["state"].values():
        found += own.values()
    shards = koi.settings.learned(koi.model).shards
    rows = [None] * len(shards.ranks)
    dist.all_gather_object(rows, [t for t in found if t.dim()], group=shards.group)
    return whole(koi.model), [torch.cat(each) for each in zip(*rows, strict=True)]


def saved(rank, shards, num_iterations, folder, case):
    """Train, or go on, with checkpoints; return what has come of it."""
    koi = in_float64(learner)(case, shards, num_iterations=num_iterations, meta_step_size=0.3)
    in_float64(koi.train)(Regressions(), checkpoint_dir=folder, resume=True, checkpoint_every=2)
    return (koi.iteration, *state(koi))


class Bad(Regression):
    """Goes wrong in the midst of the model's forward pass."""

    wrong = None

    def loss(self, model):
        if self.wrong == "nan":
            return super().loss(model) * float("nan")
        hook = model[2].register_forward_hook(lambda *_: 1 / 0) if self.wrong else None
        try:
            return super().loss(model)
        finally:
            if hook is not None:
                hook.remove()


class Bads(Regressions):
    """Tasks of which one goes wrong, once."""

    seed = mix(0, "meta-iteration", 2, "sample", 2)

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def sample(self):
        given = super().sample()
        task = Bad(given.inputs, given.targets)
        if self.wrong is not None and torch.initial_seed() == self.seed:
            task.wrong, self.wrong = self.wrong, None
        return task


def untroubled(rank):
    """Train to the end; return φ."""
    koi = in_float64(learner)("fomaml", 2)
    in_float64(koi.train)(Regressions())
    return whole(koi.model)


def in_trouble(rank, wrong, folder):
    """Let a loss go wrong; return how it ended, φ then, and φ where training has gone on."""
    koi, tasks, phi, error = in_float64(learner)("fomaml", 2), Bads(wrong), {}, None
    look = lambda koi, record: phi.update(whole(koi.model))  # noqa: E731
    options = {"checkpoint_dir": folder, "resume": True}
    try:
        in_float64(koi.train)(tasks, callbacks=[look], **options)
    except Exception as caught:
        error = caught
    ended, iteration = whole(koi.model), koi.iteration
    again = in_float64(learner)("fomaml", 2)
    in_float64(again.train)(tasks, **options)
    in_float64(koi.train)(tasks)
    return (
        type(error).__name__,
        str(error),
        iteration,
        phi,
        ended,
        whole(koi.model),
        whole(again.model),
    )


def alone_in_trouble(rank, victim):
    """Let a loss raise on one rank of a task group alone; return how it ended."""
    koi = in_float64(learner)("fomaml", 2)
    try:
        in_float64(koi.train)(Bads("raises" if rank == victim else None))
    except Exception as error:
        text = " ".join([str(error), *getattr(error, "__notes__", [])])
        return type(error).__name__, text, koi.iteration
    return None


def adapted(rank, shards):
    """Evaluate and measure; return what came of it, and whether φ is as it was."""
    koi = in_float64(learner)("fomaml", shards)
    before = whole(koi.model)
    metric = lambda model, task: model(task.inputs).sum()  # noqa: E731
    losses = in_float64(koi.evaluate)(Regressions(), num_tasks=3).losses
    measured = in_float64(koi.measure)(Regressions(), metric, num_tasks=3)
    after = whole(koi.model)
    return losses, measured, all(torch.equal(before[name], after[name]) for name in before)


def sizes(rank, shards):
    """Return how many numbers a rank holds of φ and moments."""
    koi = learner("reptile with Adam", shards, num_iterations=1)
    koi.train(Regressions())
    found = koi.state_dict()
    return sum(t.numel() for t in [*found["params"].values(), *found["moments"][:-1]])


class Living(TorchDispatchMode):
    """Notes the most bytes of tensors that lived at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its parts come here by themselves
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.storages[tensor.untyped_storage()] = None
        self.most = max(self.most, sum(storage.nbytes() for storage in self.storages))
        return found


def peak(rank, shards):
    """Return the most bytes that lived at once in a training of eight equal layers."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    if shards is not None:
        sharded(model, shards, layers=8)
    koi = Koi(model, 0.01, 2, 1, inner_optimizer="adam", vectorize=False, check=False)
    with Living() as living:
        koi.train(InTurn(Regression(torch.ones(2, 64), torch.zeros(2, 64))))
    return living.most


def refused(rank):
    """Return what is said of everything that a sharded model does not go with."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import Shard

    def other_mesh():
        model = nn.Linear(4, 4)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(1)]))
        return model

    attempts = {
        "shards of columns": lambda: Koi(other_mesh()),
        "settings": lambda: learner(
            "fomaml",
            2,
            algorithm="maml",
            vectorize=True,
            clip_inner=1.0,
            inner_optimizer=lambda params, lr: torch.optim.Adagrad(params, lr),
            meta_optimizer=lambda params: torch.optim.Adafactor(params),
        ),
        "adapt": lambda: learner("fomaml", 2).adapt(Regressions().sample()),
        "validate": lambda: learner("fomaml", 2).train(Regressions(), validate=Regressions()),
        "save": lambda: learner("fomaml", 2).save("nowhere"),
    }
    texts = {}
    for what, attempt in attempts.items():
        try:
            attempt()
        except KoiError as error:
            texts[what] = str(error)
    return texts


def printed(rank, script):
    """Return what a script prints that makes a process group of its own."""
    dist.destroy_process_group()
    with redirect_stdout(io.StringIO()) as text, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(script)
    return text.getvalue()
