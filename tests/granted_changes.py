"""What a fast path takes for granted: a model and a task that read all of it, and changes to it."""

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import koi

NUMBER = 1.0
LIST = [1.0]
DICT = {"factor": 1.0}
TENSOR = torch.ones((), dtype=torch.float64)


def function(value):
    return value


def closing_over(value):
    """Return a function that gives the value it closes over, and one that changes that."""

    def read():
        return value

    def write(other):
        nonlocal value
        value = other

    return read, write


READ, WRITE = closing_over(1.0)


class Options:
    """A user's own object."""

    def __init__(self):
        self.gain = 1.0


class Everything(nn.Module):
    """Whatever a module may hold takes part in what it computes."""

    bonus = 0.0

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.body, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.dropout, self.head = nn.Dropout(0.0), nn.Linear(4, 2)
        self.register_buffer("centre", torch.zeros(4))
        self.scale, self.power, self.kind, self.shift = 1.0, 1, "tanh", None
        self.numbers, self.table = [1.0, 2.0], {"gain": 1.0}
        self.offset, self.pair = torch.zeros(4), (1.0, torch.zeros(4))
        self.activation, self.options = torch.tanh, Options()

    def forward(self, x):
        hidden = self.frozen(x) - self.centre + self.offset + self.pair[1]
        hidden = self.norm(self.body(self.activation(self.scale * hidden)))
        hidden = hidden * self.numbers[0] * self.table["gain"] * self.options.gain
        hidden = hidden.tanh() if self.kind == "tanh" else hidden.sigmoid()
        if self.shift is not None:
            hidden = hidden + self.shift
        return self.head(self.dropout(hidden**self.power)) + self.bonus


@koi.tensor_task
@dataclass
class Reading:
    """Whatever a loss may read takes part in what it gives."""

    x: Tensor
    y: Tensor
    kind: Any
    criterion: Callable[[Tensor, Tensor], Tensor]

    factor: ClassVar[float] = 1.0

    def loss(self, model, weight=1.0):
        factor = NUMBER * LIST[0] * DICT["factor"] * TENSOR * function(1.0) * READ() * weight
        factor = factor * self.factor * {int: 1.0, float: 0.5, bool: 0.25}[type(self.kind)]
        third = torch.tensor(1 / 3)  # of the default type
        return third * factor * self.criterion(model(self.x.double()), self.y)


class Readings:
    """Draws tasks from a generator of its own."""

    def __init__(self, seed=0):
        self.seed, self.size, self.kind, self.criterion = seed, 6, 1, F.mse_loss
        self.dtype = torch.float64
        self.again()

    def again(self):
        """Begin from the first task again."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def sample(self):
        draw = functools.partial(torch.randn, generator=self.generator, dtype=torch.float64)
        x, y = draw(self.size, 3), draw(self.size, 2)
        return Reading(x.to(self.dtype), y, self.kind, self.criterion)


@dataclass
class World:
    """What a change is made to: of a learner, or of its twin.

    Args:
        model: the module.
        tasks: the distribution.
        set: changes a setting.
    """

    model: Any
    tasks: Any
    set: Callable[[str, Any], None]


def reset():
    """Undo the changes to what is neither a module's nor a task's own."""
    globals().update(NUMBER=1.0, LIST=[1.0], DICT={"factor": 1.0}, function=lambda value: value)
    globals().update(TENSOR=torch.ones((), dtype=torch.float64))
    WRITE(1.0)
    Everything.bonus, Reading.factor = 0.0, 1.0
    Reading.loss.__defaults__ = (1.0,)


def give(path, value):
    """Return the change that assigns to an attribute of the model, its parts or the tasks."""
    *owners, name = path.split(".")

    def change(world):
        setattr(functools.reduce(getattr, owners, world), name, value)

    return change


def setting(name, value):
    return lambda world: world.set(name, value)


@torch.no_grad()
def frozen_in_place(world):
    world.model.frozen.weight.mul_(3)


def frozen_by_data(world):
    world.model.frozen.weight.data.mul_(3)


def frozen_replaced(world):
    weight = 3 * world.model.frozen.weight.detach()
    world.model.frozen.weight = nn.Parameter(weight, requires_grad=False)


def buffer_in_place(world):
    world.model.centre.add_(0.5)


def buffer_replaced(world):
    world.model.centre = world.model.centre + 0.5


def list_element(world):
    world.model.numbers[0] = 2.0


def dictionary_entry(world):
    world.model.table["gain"] = 2.0


def tensor_in_place(world):
    world.model.offset.add_(0.5)


def evaluation(world):
    world.model.eval()


def evaluation_of_a_part(world):
    world.model.norm.eval()


def head_replaced(world):
    world.model.head = deepcopy(world.model.head)
    world.model.head.weight.data.neg_()


def hook(world):
    world.model.body.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_of_the_model(world):
    world.model.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def freeze(world):
    world.model.body.requires_grad_(False)


def unfreeze(world):
    world.model.frozen.requires_grad_(True)


def of_globals(**values):
    return lambda world: globals().update(values)


def global_list(world):
    LIST[0] = 2.0


def global_dictionary(world):
    DICT["factor"] = 2.0


def global_tensor(world):
    TENSOR.fill_(2.0)


def closure(world):
    WRITE(2.0)


def class_of_the_model(world):
    Everything.bonus = 1.0


def class_of_the_task(world):
    Reading.factor = 2.0


def default_argument(world):
    Reading.loss.__defaults__ = (2.0,)


def default_type(world):
    torch.set_default_dtype(torch.float32)


# Every one changes what a task's curve of losses is.
CHANGES = {
    "frozen weight in place": frozen_in_place,
    "frozen weight by .data": frozen_by_data,
    "frozen weight replaced": frozen_replaced,
    "buffer in place": buffer_in_place,
    "buffer replaced": buffer_replaced,
    "float": give("model.scale", 2.0),
    "int": give("model.power", 2),
    "float for an int": give("model.power", 3.0),
    "str": give("model.kind", "sigmoid"),
    "tensor for None": give("model.shift", torch.ones(4, dtype=torch.float64)),
    "list element": list_element,
    "list": give("model.numbers", [3.0]),
    "dictionary entry": dictionary_entry,
    "tensor in place": tensor_in_place,
    "tensor": give("model.offset", torch.ones(4, dtype=torch.float64)),
    "tuple": give("model.pair", (1.0, torch.ones(4, dtype=torch.float64))),
    "callable": give("model.activation", torch.sin),
    "attribute of an object": give("model.options.gain", 2.0),
    "class attribute of the model": class_of_the_model,
    "class attribute of the task": class_of_the_task,
    "global number": of_globals(NUMBER=2.0),
    "global list": global_list,
    "global dictionary": global_dictionary,
    "global tensor": global_tensor,
    "global tensor replaced": of_globals(TENSOR=torch.full((), 2.0, dtype=torch.float64)),
    "global function": of_globals(function=lambda value: 2 * value),
    "closure": closure,
    "default argument": default_argument,
    "field 1.0 for 1": give("tasks.kind", 1.0),
    "field True for 1": give("tasks.kind", True),
    "criterion": give("tasks.criterion", F.smooth_l1_loss),
    "dropout": give("model.dropout.p", 1.0),
    "constant of a part": give("model.norm.eps", 0.1),
    "mode": evaluation,
    "mode of a part": evaluation_of_a_part,
    "submodule replaced": head_replaced,
    "forward hook": hook,
    "forward hook of the model": hook_of_the_model,
    "frozen": freeze,
    "unfrozen": unfreeze,
    "number of examples": give("tasks.size", 40),
    "type of the data": give("tasks.dtype", torch.float16),
    "default type": default_type,
    "step_size": setting("step_size", 0.5),
    "inner_optimizer by name": setting("inner_optimizer", "adam"),
    "inner_optimizer": setting(
        "inner_optimizer", functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    ),
}

# These change what a training gives.
OF_TRAINING = {
    "num_steps": setting("num_steps", 3),
    "fewer steps": setting("num_steps", 1),
    "num_iterations": setting("num_iterations", 6),
    "fomaml": setting("algorithm", "fomaml"),
    "meta_step_size": setting("meta_step_size", 0.1),
    "meta_batch_size": setting("meta_batch_size", 3),
    "meta_optimizer": setting("meta_optimizer", functools.partial(torch.optim.Adam, lr=0.1)),
}
