"""Reptile, FOMAML and MAML as one writes them after reading the paper: Koi's twin in the tests.

Clear before fast: a deep copy and a fresh torch.optim optimizer for every task, plain loops, and
MAML's derivative through the inner loop by central differences.
"""

from copy import deepcopy

import torch


def meta_train(
    model,
    tasks,
    *,
    step_size,
    num_steps,
    num_iterations,
    meta_step_size,
    meta_batch_size=1,
    inner_optimizer=torch.optim.SGD,
    inner_state="carry",
    meta_optimizer=None,
    algorithm="reptile",
):
    """Meta-train ``model`` in place; the arguments mean what they mean in `koi.Koi`."""
    outer = meta_optimizer(learned(model)) if meta_optimizer else None
    state = None  # the inner optimizer's moments, shared by all tasks
    for iteration in range(num_iterations):
        epsilon = meta_step_size
        if callable(meta_step_size):
            epsilon = meta_step_size(iteration / num_iterations)

        gradients, adapted_models, states = [], [], []
        for task in [tasks.sample() for _ in range(meta_batch_size)]:
            steps = [task] * num_steps
            if hasattr(task, "minibatches"):
                steps = list(task.minibatches(num_steps))
            query = task.query if hasattr(task, "query") else steps[-1]

            adapted, final_state = adapt(model, steps, inner_optimizer, step_size, state)
            if algorithm == "reptile":
                pairs = zip(learned(model), learned(adapted), strict=True)
                gradient = [(p - q).detach() for p, q in pairs]
            elif algorithm == "fomaml":
                gradient = gradient_of(query, adapted)
            elif algorithm == "maml":
                gradient = maml_gradient(model, steps, query, inner_optimizer, step_size, state)
            gradients.append(gradient)
            adapted_models.append(adapted)
            states.append(final_state)

        for param, *grads in zip(learned(model), *gradients, strict=True):
            param.grad = sum(grads) / meta_batch_size
        if outer is not None:
            outer.step()
        else:
            with torch.no_grad():
                for param in learned(model):
                    param -= epsilon * param.grad
        model.zero_grad()
        for mine, *theirs in zip(buffers(model), *map(buffers, adapted_models), strict=True):
            mine += epsilon * (sum(theirs) / meta_batch_size - mine)
        if inner_state == "carry":
            state = mean_state(states)


def adapt(model, steps, inner_optimizer, step_size, state=None):
    """Return a copy of ``model`` after one optimizer step on each of ``steps``, and the moments."""
    model = deepcopy(model)
    optimizer = inner_optimizer(learned(model), step_size)
    if state is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": deepcopy(state)})
    for step in steps:
        optimizer.zero_grad()
        step.loss(model).backward()
        optimizer.step()
    model.zero_grad()
    return model, optimizer.state_dict()["state"]


def gradient_of(task, model):
    """Return the gradient of the task's loss, leaving ``model`` and its buffers alone."""
    model = deepcopy(model)
    task.loss(model).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in learned(model)]


def maml_gradient(model, steps, query, inner_optimizer, step_size, state, h=1e-5):
    """Return d query loss(φ̃(φ)) / dφ, one coordinate of φ after the other."""

    def loss_after_adapting():
        return query.loss(adapt(model, steps, inner_optimizer, step_size, state)[0]).item()

    gradient = []
    for param in learned(model):
        gradient.append(torch.zeros_like(param))
        for i in range(param.numel()):
            value = param.data.view(-1)[i].item()
            param.data.view(-1)[i] = value + h
            above = loss_after_adapting()
            param.data.view(-1)[i] = value - h
            below = loss_after_adapting()
            param.data.view(-1)[i] = value
            gradient[-1].view(-1)[i] = (above - below) / (2 * h)
    return gradient


def mean_state(states):
    """Return the mean over tasks of optimizer states {parameter: {name: value}}."""
    return {
        index: {name: sum(s[index][name] for s in states) / len(states) for name in slots}
        for index, slots in states[0].items()
    }


def learned(model):
    return [p for p in model.parameters() if p.requires_grad]


def buffers(model):
    return [b for b in model.buffers() if b.is_floating_point()]
