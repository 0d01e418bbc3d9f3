"""Images as functions: a network (row, column) -> colour that fits a new picture in a few steps.

A SIREN's initialisation (Sitzmann et al., arXiv 2006.09661) is learned on squares of photographs;
squares of others are fitted from it and from SIREN's own. It prints a table, writes images.png.
"""

import os
from dataclasses import dataclass
from itertools import cycle, islice, pairwise, product

import numpy as np
import torch
from matplotlib.figure import Figure
from skimage import data
from skimage.transform import resize
from torch import nn

from koi import Koi, tensor_task

ITERATIONS, NUM_SQUARES, NUM_TASKS, NUM_TRIALS, STEPS = 300, 150, 20, 6, (0, 1, 2, 4, 8, 16)
SETTINGS = [("sgd", 0.03), ("sgd", 0.1), ("adam", 0.001), ("adam", 0.003), ("adam", 0.01)]
if os.environ.get("KOI_EXAMPLE_SHORT"):
    ITERATIONS, NUM_SQUARES, NUM_TASKS, NUM_TRIALS, STEPS = 30, 12, 4, 2, (0, 1, 2)
    SETTINGS = SETTINGS[:1]
TRAINING = data.coffee, data.rocket, data.retina, data.hubble_deep_field, data.immunohistochemistry
TEST = data.astronaut, data.chelsea
SIZE = 48  # pixels of a side
GRID = torch.cartesian_prod(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE))


class Siren(nn.Module):
    """Sines of frequency 30, with the initial weights that its authors give."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*size) for size in pairwise((2, width, width, 3)))
        for number, layer in enumerate(self.layers):
            reach = (6 / layer.in_features) ** 0.5 / 30 if number else 1 / layer.in_features
            nn.init.uniform_(layer.weight, -reach, reach)

    def forward(self, points):
        for layer in self.layers[:-1]:
            points = torch.sin(30 * layer(points))
        return self.layers[-1](points) + 0.5


@tensor_task
@dataclass
class Picture:
    """A task: some points and their colours, from 0 to 1."""

    points: torch.Tensor
    colours: torch.Tensor

    def loss(self, model):
        return (model(self.points) - self.colours).square().mean()


class Squares:
    """Squares of photographs, of any place and size; of each some pixels, or all."""

    def __init__(self, photographs, count, seed, num_pixels=SIZE**2):
        self.squares, self.num_pixels, random = [], num_pixels, np.random.default_rng(seed)
        for photograph in islice(cycle([load() for load in photographs]), count):
            side = random.integers(96, min(photograph.shape[:2]) + 1)
            top, left = random.integers(0, np.array(photograph.shape[:2]) - side + 1)
            square = resize(photograph[top : top + side, left : left + side], (SIZE, SIZE))
            self.squares.append(Picture(GRID, torch.tensor(square).float().reshape(-1, 3)))

    def sample(self):
        square = self.squares[torch.randint(len(self.squares), ())]
        some = torch.randperm(SIZE**2)[: self.num_pixels]
        return Picture(square.points[some], square.colours[some])


def train(model):
    adam = {"meta_optimizer": lambda params: torch.optim.Adam(params, lr=1e-3)}
    koi = Koi(model, 0.03, 2, ITERATIONS, meta_batch_size=5, algorithm="maml", seed=0, **adam)
    koi.train(Squares(TRAINING, NUM_SQUARES, seed=0, num_pixels=512))


def psnr(model, squares, num_tasks, optimizer, step_size):  # in dB, after 0, 1, 2 … steps
    koi = Koi(model, step_size, STEPS[-1], inner_optimizer=optimizer, chunk_size=10, seed=1)
    return -10 * koi.evaluate(squares, num_tasks).losses.log10()


def best_settings(model, squares):
    """For each number of steps, the optimizer and step size with the highest PSNR."""
    curves = {how: psnr(model, squares, NUM_TRIALS, *how).mean(0) for how in SETTINGS}
    return {k: max(curves, key=lambda how: curves[how][k]) for k in STEPS}


def draw(models, settings, pictures):
    figure = Figure(figsize=(9.6, 3 * len(pictures)), dpi=150, layout="constrained")
    rows = figure.subplots(2 * len(pictures), len(STEPS) + 1)
    for row, (picture, name) in zip(rows, product(pictures, models), strict=True):
        panels = {"truth": picture.colours}
        for k in STEPS:
            koi = Koi(models[name], settings[name][k][1], inner_optimizer=settings[name][k][0])
            panels[f"{k} steps"] = koi.adapt(picture, num_steps=k)(GRID).detach()
        for axes, (title, colours) in zip(row, panels.items(), strict=True):
            axes.imshow(colours.reshape(SIZE, SIZE, 3).clamp(0, 1).numpy())
            axes.set(xticks=[], yticks=[], title=title)
        row[0].set_ylabel(name)
    figure.savefig("images.png")


if __name__ == "__main__":
    torch.manual_seed(0)
    models = {"SIREN's own": Siren(), "learned": Siren()}
    train(models["learned"])
    validation, test = Squares(TRAINING, NUM_TRIALS, seed=1), Squares(TEST, NUM_TASKS, seed=8)
    settings = {name: best_settings(model, validation) for name, model in models.items()}
    for name, model in models.items():
        curves = {how: psnr(model, test, NUM_TASKS, *how) for how in set(settings[name].values())}
        for k, how in settings[name].items():
            mean, half = curves[how][:, k].mean(), 1.96 * curves[how][:, k].std() / NUM_TASKS**0.5
            print(f"{name:<12} {k:>2} steps  {mean:5.2f} ± {half:.2f} dB  {how}")
    draw(models, settings, test.squares[:2])
