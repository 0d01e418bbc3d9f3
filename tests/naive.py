"""Every algorithm as one writes it after reading the paper: Koi's twin in the tests.

Clear before fast: a deep copy and a fresh torch.optim optimizer for every task, plain loops, and
MAML's derivative through the inner loop by central differences.
"""

from copy import deepcopy
from fnmatch import fnmatch

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
    clip_meta=None,
    average=None,
    adapts=None,
    learns=None,
    inner_schedule=None,
    clip_inner=None,
    learn_step_size=None,
    state=None,
):
    """Meta-train ``model`` in place; the arguments mean what they mean in `koi.Koi`.

    Returns the inner optimizer's moments, shared by all tasks, for a training that goes on as
    ``state``; None where every task starts afresh. With ``average``, the mean of φ instead; with
    ``learn_step_size``, the learned rates.
    """
    means, weights = [0.0 for _ in learned(model, learns)], 0.0
    own_rates = first_rates(model, step_size, num_steps, learn_step_size, adapts)
    everything = [*learned(model, learns), *own_rates.values()]
    outer = meta_optimizer(everything) if meta_optimizer else None
    for iteration in range(num_iterations):
        fraction = iteration / num_iterations
        inner_rates = Rates(
            step_size, fraction, inner_schedule, clip_inner, own_rates, learn_step_size
        )
        epsilon = meta_step_size
        if callable(meta_step_size):
            epsilon = meta_step_size(iteration / num_iterations)

        gradients, adapted_models, states = [], [], []
        batch = [tasks.sample() for _ in range(meta_batch_size)]
        counts = [count_of(task) for task in batch]
        for task in batch:
            steps = views(task, num_steps)
            query = task.query if hasattr(task, "query") else steps[-1]
            if algorithm == "maml":  # first, since a loss may change what is the task's own
                inner = inner_optimizer, inner_rates, state
                gradient = maml_gradient(model, steps, query, *inner, adapts, learns)
            path = []
            adapted, final_state = adapt(
                *(model, steps, inner_optimizer, inner_rates, state),
                lambda m, path=path: note(path, m, learns),
                adapts,
            )
            if algorithm == "reptile":
                pairs = zip(learned(model, learns), learned(adapted, learns), strict=True)
                gradient = [(p - q).detach() for p, q in pairs]
            elif algorithm == "eigen-reptile":
                gradient = against_main_direction(path)
            elif algorithm == "fomaml":
                gradient = gradient_of(query, adapted, learns)
                if own_rates:
                    gradient += inner_rates.slopes(gradient_of(query, adapted), adapted)
            gradients.append(gradient)
            adapted_models.append(adapted)
            states.append(final_state)

        for param, *grads in zip(everything, *gradients, strict=True):
            param.grad = mean(grads, counts)
        if clip_meta is not None:
            torch.nn.utils.clip_grad_norm_(everything, clip_meta)
        if outer is not None:
            rates = [group["lr"] for group in outer.param_groups]
            for group, rate in zip(outer.param_groups, rates, strict=True):
                group["lr"] = rate * epsilon
            outer.step()
            for group, rate in zip(outer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            with torch.no_grad():
                for param in everything:
                    param -= epsilon * param.grad
        model.zero_grad()
        move_buffers(model, adapted_models, counts, min(epsilon, 1.0) if outer else epsilon)
        if inner_state == "carry":
            state = mean_state(states, counts)
        if average is not None:
            weights = average * weights + 1
            pairs = zip(means, learned(model, learns), strict=True)
            means = [average * mean + p.detach() for mean, p in pairs]
    if learn_step_size is not None:
        return own_rates
    return state if average is None else [mean / weights for mean in means]


def first_rates(model, step_size, num_steps, kind, adapts=None):
    """Return the rates that are learned: of each number, or of each inner step."""
    if kind is None:
        return {}
    given, names = Rates(step_size), {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: torch.full(
            p.shape if kind == "parameter" else (num_steps,),
            given.of(names[id(p)], 0),
            dtype=p.dtype,
        )
        for p in learned(model, adapts)
    }


def evaluate(
    model,
    tasks,
    num_tasks,
    num_steps,
    *,
    step_size,
    inner_optimizer=torch.optim.SGD,
    state=None,
    adapts=None,
):
    """Return each task's query loss before and after each step, shape (num_tasks, steps + 1)."""
    rows = []
    for task in [tasks.sample() for _ in range(num_tasks)]:
        steps, row = views(task, num_steps), []
        query = task.query if hasattr(task, "query") else task

        def measure(adapted, row=row, query=query):
            row.append(query.loss(deepcopy(adapted)).item())

        adapt(model, steps, inner_optimizer, step_size, state, measure, adapts)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


class Rates:
    """The rate of each parameter at each inner step, at a fraction of the training."""

    def __init__(self, step_size, fraction=0.0, schedule=None, clip=None, own=None, kind=None):
        self.step_size, self.fraction, self.schedule, self.clip = (
            step_size,
            fraction,
            schedule,
            clip,
        )
        self.own, self.by_step, self.ways = own or {}, kind == "layer", []
        self.vary = bool(own) or schedule is not None or not isinstance(step_size, int | float)

    def step(self, optimizer, model, fraction, step):
        """Step with one group for each parameter, each with its rate."""
        names = {id(p): name for name, p in model.named_parameters()}
        if self.own:
            return self.step_by_own(optimizer, model, fraction, step)
        groups = optimizer.param_groups
        optimizer.param_groups = [
            {**group, "params": [p], "lr": group["lr"] * self.of(names[id(p)], fraction)}
            for group in groups
            for p in group["params"]
        ]
        optimizer.step()
        optimizer.param_groups = groups

    def step_by_own(self, optimizer, model, fraction, step):
        """Step as far as the learned rates say of the way at a rate of 1."""
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        factor = self.schedule(fraction) if self.schedule else 1
        if step == 0:
            self.ways = []
        self.ways.append({})
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name in self.own:
                    self.ways[-1][name] = factor * (param - before[name])
                    param.copy_(before[name] + self.at(name, step) * self.ways[-1][name])

    def at(self, name, step):
        rate = self.own[name]
        return rate[min(step, len(rate) - 1)] if self.by_step else rate

    def slopes(self, gradient, model):
        """Return ⟨∇L(φ̃), d_j⟩ for each learned rate."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        of = dict(zip(names, gradient, strict=True))
        found = []
        for name, rate in self.own.items():
            products = [ways[name] * of[name] for ways in self.ways]
            slope = torch.zeros_like(rate)
            for j, product in enumerate(products):
                if self.by_step:
                    slope[min(j, len(rate) - 1)] += product.sum()
                else:
                    slope += product
            found.append(slope)
        return found

    def of(self, name, fraction):
        rate = self.step_size
        if isinstance(rate, dict):
            rate = next(rate for pattern, rate in rate.items() if fnmatch(name, pattern))
        rate = rate(self.fraction) if callable(rate) else rate
        return rate * (self.schedule(fraction) if self.schedule else 1)


def views(task, num_steps):
    """Return the task as each inner step sees it."""
    if hasattr(task, "minibatches"):
        return list(task.minibatches(num_steps))
    return [task] * num_steps


def adapt(
    model,
    steps,
    inner_optimizer,
    step_size,
    state=None,
    after_each=lambda model: None,
    adapts=None,
):
    """Return a copy of ``model`` after one optimizer step on each of ``steps``, and the moments."""
    model = deepcopy(model)
    rates = step_size if isinstance(step_size, Rates) else Rates(step_size)
    optimizer = inner_optimizer(learned(model, adapts), 1.0 if rates.vary else rates.step_size)
    fresh = optimizer.state_dict()["param_groups"]
    if state is not None:
        groups = [group | numbers for group, numbers in zip(fresh, state["groups"], strict=True)]
        optimizer.load_state_dict({"state": deepcopy(state["state"]), "param_groups": groups})
    after_each(model)
    for j, step in enumerate(steps):
        optimizer.zero_grad()
        step.loss(model).backward()
        if rates.clip is not None:
            torch.nn.utils.clip_grad_norm_(learned(model, adapts), rates.clip)
        if rates.vary:
            rates.step(optimizer, model, j / len(steps), j)
        else:
            optimizer.step()
        after_each(model)
    model.zero_grad()
    after = optimizer.state_dict()
    moved = [moved_numbers(*pair) for pair in zip(fresh, after["param_groups"], strict=True)]
    return model, {"state": after["state"], "groups": moved}


def gradient_of(task, model, learns=None):
    """Return the gradient of the task's loss, leaving ``model`` and its buffers alone."""
    model = deepcopy(model)
    task.loss(model).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in learned(model, learns)]


def note(path, model, learns=None):
    """Append a copy of the parameters of ``model`` to ``path``."""
    path.append([p.detach().clone() for p in learned(model, learns)])


def against_main_direction(path):
    """Return −s ζ e of Eigen-Reptile, by the singular values of all parameters in one vector."""
    vectors = torch.stack([torch.cat([coordinates(p) for p in params]) for params in path])
    _, sizes, directions = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    if sizes[0] == 0:
        return [torch.zeros_like(p) for p in path[0]]
    half = len(vectors) // 2
    onwards = (vectors[-half:].mean(0) - vectors[:half].mean(0)) @ directions[0]
    share = sizes[0] ** 2 / sizes.square().sum()
    length = (vectors.diff(dim=0) @ directions[0]).abs().sum()
    move = share * length * onwards.sign() * directions[0]
    gradient = [torch.zeros_like(p) for p in path[0]]
    slopes = [coordinates(p) for p in gradient]
    for slope, part in zip(slopes, move.split([s.numel() for s in slopes]), strict=True):
        slope.copy_(-part)
    return gradient


def maml_gradient(
    model, steps, query, inner_optimizer, step_size, state, adapts=None, learns=None, h=1e-5
):
    """Return d query loss(φ̃(φ)) / dφ, one coordinate of φ after the other."""

    def loss_after_adapting():
        mine, held_out = deepcopy((steps, query))
        end, _ = adapt(model, mine, inner_optimizer, step_size, state, adapts=adapts)
        return held_out.loss(end).item()

    gradient = []
    own_rates = step_size.own.values() if isinstance(step_size, Rates) else ()
    for param in [*learned(model, learns), *own_rates]:
        gradient.append(torch.zeros_like(param))
        values, slopes = coordinates(param.data), coordinates(gradient[-1])
        for i in range(len(values)):
            value = values[i].item()
            values[i] = value + h
            above = loss_after_adapting()
            values[i] = value - h
            below = loss_after_adapting()
            values[i] = value
            slopes[i] = (above - below) / (2 * h)
    return gradient


def coordinates(tensor):
    """Return a view of all real numbers in ``tensor``."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


@torch.no_grad()
def move_buffers(model, adapted_models, counts, epsilon):
    """φ_b ← φ_b + ε · mean(φ̃_b − φ_b); what no task changed stays, and what is infinite with it.

    Integers and flags, which have no mean, become what the last task that counts left.
    """
    for mine, *theirs in zip(model.buffers(), *(m.buffers() for m in adapted_models), strict=True):
        if mine.is_floating_point() or mine.is_complex():
            moves = [torch.where(its == mine, 0, its - mine) for its in theirs]
            mine += epsilon * mean(moves, counts)
        elif epsilon > 0:
            mine.copy_([its for its, count in zip(theirs, counts, strict=True) if count > 0][-1])


def count_of(task):
    """Return what a task counts in the mean."""
    weight = getattr(task, "weight", None)
    return 1 if weight is None else float(weight)


def mean(values, counts):
    """Return the mean of values of which each counts so much."""
    return sum(c * v for c, v in zip(counts, values, strict=True)) / sum(counts)


def moved_numbers(fresh, after):
    """Return the numbers of an optimizer's parameter group that its steps have changed.

    Schedulers set rate and momentum as a task goes on: these begin anew with the next one.
    """
    return {
        name: value
        for name, value in after.items()
        if name not in ("lr", "momentum")
        and isinstance(value, int | float | torch.Tensor)
        and bool(value != fresh[name])
    }


def mean_state(states, counts):
    """Return the mean over tasks of what their optimizers keep, zero where one keeps nothing.

    That is {parameter: {name: value}}, and {name: value} for every parameter group.
    """
    kept = [s["state"] for s in states]
    slots = {(index, name) for one in kept for index in one for name in one[index]}
    means = {index: {} for index, _ in sorted(slots)}
    for index, name in slots:
        means[index][name] = mean([s.get(index, {}).get(name, 0) for s in kept], counts)
    groups = []
    for each in zip(*(s["groups"] for s in states), strict=True):
        names = set().union(*each)
        values = {name: [group[name] for group in each] for name in names}
        groups.append({name: mean_number(each, counts) for name, each in values.items()})
    return {"state": means, "groups": groups}


def mean_number(values, counts):
    """Return the mean; a number that all tasks agree on, such as a count, stays what it is."""
    same = all(bool(value == values[0]) for value in values)
    return values[0] if same else mean(values, counts)


def learned(model, names=None):
    """Return the parameters that can learn, of these names where some are given."""
    named = model.named_parameters()
    return [p for n, p in named if p.requires_grad and (names is None or n in names)]
