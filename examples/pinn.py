"""Physics-informed networks for a family of equations, each fitted by L-BFGS, not by Koi's steps.

Every task is a boundary value problem, −u″ + u³ = f on [0, 1] with u(0) = u(1) = 0 and an f of its
own. A task has `adapt(model, num_steps)`: so many iterations of torch.optim.LBFGS on the equation's
residual. Reptile learns where they begin. `python examples/pinn.py` prints a table.
"""

import math
import os

import torch
from torch import nn

from koi import Koi

ITERATIONS, NUM_TASKS, STEPS = 30, 10, (0, 5, 10, 20, 40)
if os.environ.get("KOI_EXAMPLE_SHORT"):
    ITERATIONS, NUM_TASKS, STEPS = 2, 2, (0, 5)
POINTS = torch.linspace(0, 1, 33).unsqueeze(1)  # where the residual is looked at
GRID = torch.linspace(0, 1, 201).unsqueeze(1)  # where the solution is compared with the truth


class Equation:
    """One right-hand side f: that of which u(x) = Σ a_n sin(nπx) is the solution."""

    def __init__(self):
        self.amplitudes = torch.randn(3) / torch.arange(1, 4)

    def truth(self, x):
        return self.sines(x)[0].sum(1)

    def sines(self, x):
        waves = math.pi * torch.arange(1, 4)
        terms = self.amplitudes * (waves * x).sin()
        return terms, -(waves**2) * terms  # of u and of u″

    def residual(self, model, x):
        """−u″ + u³ − f of the network's u, which is 0 at both ends by construction."""
        x = x.clone().requires_grad_()
        u = solution(model, x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        true, true_bend = (terms.sum(1) for terms in self.sines(x.detach()))
        return -bend.squeeze(1) + u**3 - (-true_bend + true**3)

    def adapt(self, model, num_steps):
        """The inner loop, of which Koi sees the end alone."""
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=num_steps, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = self.residual(model, POINTS).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


class Equations:
    def sample(self):
        return Equation()


def solution(model, x):
    return x.squeeze(1) * (1 - x.squeeze(1)) * model(x).squeeze(1)


def error(model, equation):
    """The largest error of the solution anywhere."""
    return (solution(model, GRID) - equation.truth(GRID)).abs().max()


def network():
    layers = nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    return nn.Sequential(*layers)


def main():
    torch.manual_seed(0)
    models = {"random weights": network(), "learned start": network()}
    koi = Koi(models["learned start"], num_steps=20, num_iterations=ITERATIONS, seed=0)
    koi.meta_batch_size = 5
    koi.train(Equations())
    print("median over equations of the largest error, after so many iterations of L-BFGS")
    print(f"{'':16}" + "".join(f"{k:>10}" for k in STEPS))
    for name, model in models.items():
        tester = Koi(model, seed=1)  # the same equations for both
        errors = [tester.measure(Equations(), error, NUM_TASKS, num_steps=k) for k in STEPS]
        print(f"{name:16}" + "".join(f"{e.median():10.2e}" for e in errors))


if __name__ == "__main__":
    main()
