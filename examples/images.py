"""Images as functions: a network (row, column) -> colour that fits a new picture in a few steps.

The initialisation of a SIREN (Sitzmann et al., arXiv 2006.09661) is learned by MAML on squares of
six photographs. Squares of two other photographs are then fitted from it and from SIREN's own.
`python examples/images.py` prints a table and writes images.png.
"""

import itertools
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from skimage import data
from skimage.transform import resize
from torch import nn

from koi import Koi, tensor_task

ITERATIONS, NUM_SQUARES, NUM_TASKS, NUM_TRIALS = 600, 300, 40, 12
STEPS = 0, 1, 2, 4, 8, 16
SETTINGS = [("sgd", 0.01), ("sgd", 0.03), ("sgd", 0.1)]  # inner optimizers to choose from
SETTINGS += [("adam", 0.001), ("adam", 0.003), ("adam", 0.01)]
if os.environ.get("KOI_EXAMPLE_SHORT"):
    ITERATIONS, NUM_SQUARES, NUM_TASKS, NUM_TRIALS = 30, 12, 4, 2
    STEPS, SETTINGS = (0, 1, 2), SETTINGS[1:2]
PHOTOGRAPHS = {
    "training": [data.coffee, data.rocket, data.retina, data.hubble_deep_field]
    + [data.immunohistochemistry, lambda: data.stereo_motorcycle()[0]],
    "test": [data.astronaut, data.chelsea],
}
SIZE = 48  # pixels of a side
GRID = torch.cartesian_prod(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE))


class Siren(nn.Module):
    """Sines of frequency 30, with the initial weights that its authors give."""

    def __init__(self, width=128):
        super().__init__()
        sizes = itertools.pairwise((2, width, width, 3))
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        for number, layer in enumerate(self.layers):
            reach = math.sqrt(6 / layer.in_features) / 30 if number else 1 / layer.in_features
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


def square(photograph, top, left, side):
    """A square of a photograph as a task."""
    cut = photograph[top : top + side, left : left + side]
    colours = resize(cut, (SIZE, SIZE), anti_aliasing=True).reshape(-1, 3)
    return Picture(GRID, torch.tensor(colours, dtype=torch.float32))


class Squares:
    """Squares of photographs, of any place and size; of each some pixels, or all."""

    def __init__(self, part, count, seed, num_pixels=SIZE**2):
        photographs, random = [load() for load in PHOTOGRAPHS[part]], np.random.default_rng(seed)
        self.squares, self.num_pixels = [], num_pixels
        for photograph in itertools.islice(itertools.cycle(photographs), count):
            side = random.integers(96, min(photograph.shape[:2]) + 1)
            corner = random.integers(0, np.array(photograph.shape[:2]) - side + 1)
            self.squares.append(square(photograph, *corner, side))

    def sample(self):
        picture = self.squares[torch.randint(len(self.squares), ())]
        some = torch.randperm(SIZE**2)[: self.num_pixels]
        return Picture(picture.points[some], picture.colours[some])


def train(model):
    adam = {"meta_optimizer": lambda params: torch.optim.Adam(params, lr=1e-3)}
    koi = Koi(model, 0.03, 2, ITERATIONS, meta_batch_size=5, algorithm="maml", seed=0, **adam)
    koi.train(Squares("training", NUM_SQUARES, seed=0, num_pixels=512))
    return koi


def psnr(model, squares, num_tasks, optimizer, step_size):
    """Peak signal-to-noise ratio in dB of each square after 0, 1, 2 … steps."""
    koi = Koi(model, step_size, STEPS[-1], inner_optimizer=optimizer, chunk_size=10, seed=1)
    return -10 * koi.evaluate(squares, num_tasks).losses.log10()


def best_settings(model, squares):
    """For each number of steps, the optimizer and step size with the highest PSNR."""
    curves = {how: psnr(model, squares, NUM_TRIALS, *how).mean(0) for how in SETTINGS}
    return {k: max(curves, key=lambda how: curves[how][k]) for k in STEPS}


def draw(models, settings):
    """A face and a cat, each as fitted from both initialisations."""
    figure = Figure(figsize=(9.6, 6), dpi=150, layout="constrained")
    person, cat = (load() for load in PHOTOGRAPHS["test"])
    cases = itertools.product((square(person, 20, 130, 190), square(cat, 20, 90, 260)), models)
    for row, (picture, name) in zip(figure.subplots(4, len(STEPS) + 1), cases, strict=True):
        panels = {"truth": picture.colours}
        for k in STEPS:
            optimizer, step_size = settings[name][k]
            koi = Koi(models[name], step_size, inner_optimizer=optimizer)
            panels[f"{k} steps"] = koi.adapt(picture, num_steps=k)(GRID).detach()
        for axes, (title, colours) in zip(row, panels.items(), strict=True):
            axes.imshow(colours.reshape(SIZE, SIZE, 3).clamp(0, 1))
            axes.set(xticks=[], yticks=[], title=title)
        row[0].set_ylabel(name)
    figure.savefig("images.png")


if __name__ == "__main__":
    torch.manual_seed(0)
    models = {"SIREN's own": Siren(), "learned": Siren()}
    koi = train(models["learned"])
    print(f"{ITERATIONS} meta-iterations, {koi.engine}")
    validation, test = Squares("training", NUM_TRIALS, seed=1), Squares("test", NUM_TASKS, seed=2)
    settings = {name: best_settings(model, validation) for name, model in models.items()}
    for name, model in models.items():
        curves = {how: psnr(model, test, NUM_TASKS, *how) for how in set(settings[name].values())}
        for k, how in settings[name].items():
            mean, half = curves[how][:, k].mean(), 1.96 * curves[how][:, k].std() / NUM_TASKS**0.5
            print(f"{name:<12} {k:>2} steps  {mean:5.2f} ± {half:.2f} dB  {how}")
    draw(models, settings)
