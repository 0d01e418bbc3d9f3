"""What goes into the graphs and comes out of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from koi.phi.arithmetic import Tensors
from koi.phi.rates import StepRates


class State(NamedTuple):
    """What an inner step changes: parameters, buffers, the optimizer's moments.

    With it go what multiplies each parameter's rate: at each inner step, shape (steps, parameters),
    or, for a graph of one step, at this one; None: 1; the learned rates;
    and what each of many tasks counts in the means, shape (tasks,); None: all the same.
    """

    params: Tensors
    buffers: Tensors
    moments: Tensors
    rates: StepRates = None
    learned: Tensors | tuple[()] = ()
    weights: Tensor | None = None


class Adapted(NamedTuple):
    """Where the inner loop ended, and what algorithms ask for (as in `koi.inner.stepwise`)."""

    state: State
    losses: Tensors
    path: list[Tensors]
    gradient: Tensors
    gradient_of_rates: Tensors | tuple[()] = ()


class TrainOutput(NamedTuple):
    """An `Outcome`, its losses, the tasks' norms and the meta-gradient's in one tensor."""

    given: Tensors
    buffers: Tensors
    constants: Tensors
    moments: Tensors
    figures: Tensor
