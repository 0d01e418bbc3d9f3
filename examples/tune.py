"""Settings chosen by Optuna on validation tasks: `python examples/tune.py`"""

import os

import optuna
import torch

from koi import Koi, linear
from koi.models import sine_mlp
from koi.problems import Sines

SHORT = "KOI_EXAMPLE_SHORT" in os.environ
TRIALS, ITERATIONS = (3, 20) if SHORT else (30, 2000)


def validation_loss(trial):
    torch.manual_seed(0)
    koi = Koi(
        sine_mlp(),
        step_size=trial.suggest_float("step_size", 0.001, 0.1, log=True),
        num_steps=trial.suggest_int("num_steps", 2, 10),
        num_iterations=ITERATIONS,
        meta_step_size=linear(trial.suggest_float("epsilon", 0.05, 1.0, log=True), 0.0),
        on_nonfinite="skip",
        seed=0,
    )

    def report(koi, record):
        if record.validation is not None:
            trial.report(record.validation, record.iteration)
            if trial.should_prune():  # worse than the median of the trials before
                raise optuna.TrialPruned

    waves = Sines(num_points=10)  # to measure on: 100 of them, the same for every trial
    koi.train(Sines(), callbacks=[report], validate=waves, validate_every=ITERATIONS // 4)
    return koi.best.value


if __name__ == "__main__":
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner())
    study.optimize(validation_loss, n_trials=TRIALS)
    print(study.best_value, study.best_params)
