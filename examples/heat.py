"""A family of physical systems: the temperature of a rod, everywhere, from 15 noisy readings.

Every rod has a diffusivity and an initial temperature of its own. A network (place, time) ->
temperature is fitted to the readings of one rod, from an initialisation that was learned on other
rods and from random weights. `python examples/heat.py` prints a table and writes heat.png.
"""

import math
import os
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn

from koi import Koi, tensor_task

ITERATIONS, NUM_TASKS, NUM_TRIALS, STEPS = 1000, 100, 20, (0, 1, 2, 4, 8, 16, 32)
SETTINGS = [("sgd", 0.03), ("sgd", 0.1), ("sgd", 0.3)]  # inner optimizers to choose from
SETTINGS += [("adam", 0.001), ("adam", 0.003), ("adam", 0.01)]
if os.environ.get("KOI_EXAMPLE_SHORT"):
    ITERATIONS, NUM_TASKS, NUM_TRIALS, STEPS, SETTINGS = 30, 5, 3, (0, 1, 2, 4), SETTINGS[1:2]
NOISE = 0.05  # standard deviation of a reading's error; rods start with temperatures of about 1
PLACES, TIMES = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0])
SENSORS = torch.cartesian_prod(PLACES, TIMES)  # three thermometers, read five times
EVERYWHERE = torch.cartesian_prod(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21))


def temperature(points, diffusivity, amplitudes):
    """The solution of u_t = diffusivity · u_xx with u = 0 at both ends of the rod, x = 0 and 1."""
    x, t = points[:, :1], points[:, 1:]
    mode = math.pi * torch.arange(1, len(amplitudes) + 1)
    return (amplitudes * (mode * x).sin() * (-diffusivity * mode**2 * t).exp()).sum(1)


@tensor_task
@dataclass
class Rod:
    """A task: what was measured where; and, to judge by, the truth everywhere."""

    points: torch.Tensor
    readings: torch.Tensor
    everywhere: torch.Tensor
    truth: torch.Tensor

    def loss(self, model):
        return (model(self.points).squeeze(-1) - self.readings).square().mean()

    @property
    def query(self):
        return Rod(self.everywhere, self.truth, self.everywhere, self.truth)


class Rods:
    """The family: diffusivities from 0.02 to 0.5, initial temperatures of three sine waves."""

    def sample(self):
        system = 0.02 * 25 ** torch.rand(()), torch.randn(3) / torch.arange(1, 4)
        readings = temperature(SENSORS, *system) + NOISE * torch.randn(len(SENSORS))
        return Rod(SENSORS, readings, EVERYWHERE, temperature(EVERYWHERE, *system))


def network():
    layers = nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    return nn.Sequential(*layers)


def train(model):
    adam = {"meta_optimizer": lambda params: torch.optim.Adam(params, lr=3e-3)}
    koi = Koi(model, 0.1, 4, ITERATIONS, meta_batch_size=10, algorithm="maml", seed=0, **adam)
    koi.train(Rods())
    return koi


def errors(model, num_tasks, seed, optimizer, step_size):
    """Mean squared error over the whole rod, of each rod, after 0, 1, 2 … steps."""
    koi = Koi(model, step_size, STEPS[-1], inner_optimizer=optimizer, seed=seed)
    return koi.evaluate(Rods(), num_tasks).losses


def best_settings(model):
    """For each number of steps, the optimizer and step size with the smallest error."""
    curves = {how: errors(model, NUM_TRIALS, 1, *how).mean(0) for how in SETTINGS}
    return {k: min(curves, key=lambda how: curves[how][k]) for k in STEPS}


def draw(models, settings):
    """One rod: the truth, and what the networks say after some steps."""
    torch.manual_seed(4)
    rod, shown = Rods().sample(), (STEPS[0], *STEPS[2:])
    figure = Figure(figsize=(9.6, 3), dpi=150, layout="constrained")
    style = {"extent": (0, 1, 0, 1), "origin": "lower", "cmap": "RdBu_r", "vmin": -1.5, "vmax": 1.5}
    for row, (name, model) in zip(figure.subplots(2, len(shown) + 1), models.items(), strict=True):
        fields = {"truth": rod.truth}
        for k in shown:
            optimizer, step_size = settings[name][k]
            adapted = Koi(model, step_size, inner_optimizer=optimizer).adapt(rod, num_steps=k)
            fields[f"{k} steps"] = adapted(EVERYWHERE).detach()
        for axes, (title, field) in zip(row, fields.items(), strict=True):
            axes.imshow(field.reshape(21, 21).numpy(), interpolation="bicubic", **style)
            axes.set(xticks=[], yticks=[], title=title)
        row[0].plot(SENSORS[:, 1], SENSORS[:, 0], "k.", markersize=3)
        row[0].set_ylabel(f"{name}\nplace")
    figure.savefig("heat.png")


if __name__ == "__main__":
    torch.manual_seed(0)
    models = {"random": network(), "learned": network()}
    koi = train(models["learned"])
    print(f"{ITERATIONS} meta-iterations, {koi.engine}")
    settings = {name: best_settings(model) for name, model in models.items()}
    for name, model in models.items():
        curves = {how: errors(model, NUM_TASKS, 2, *how) for how in set(settings[name].values())}
        for k, how in settings[name].items():
            mean, half = curves[how][:, k].mean(), 1.96 * curves[how][:, k].std() / NUM_TASKS**0.5
            print(f"{name:<8} {k:>2} steps  {mean:.4f} ± {half:.4f}  {how}")
    draw(models, settings)
