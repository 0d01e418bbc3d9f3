"""The model card of a run: its README.md."""

from __future__ import annotations

import shlex
from typing import Any

from koi.files import replace_file
from koi.lab.card import model_card
from koi.lab.runs.export import export
from koi.lab.runs.folder import Config, Run
from koi.recipes import FewShotRecipe

# The problem of a recipe -> its data, and the licence of weights that were learned from them.
_DATA = {
    "omniglot": (
        {
            "name": "Omniglot (Lake et al., 2015)",
            "license": "MIT",
            "url": "https://github.com/brendenlake/omniglot",
        },
        "mit",
    ),
    "mini-imagenet": (
        {
            "name": "mini-ImageNet (Vinyals et al., 2016)",
            "license": "ImageNet's terms of access, for research only",
            "url": "https://www.image-net.org",
        },
        "other",
    ),
}
_OTHER = {"name": "images in folders of classes", "license": "that of the images"}, "other"
_NETWORKS = {"omniglot": "omniglot_net", "mini-imagenet": "mini_imagenet_net"}


def write_card(run: Run) -> None:
    """Write the run's README.md from its configuration and results, in the place of an older one.

    Beside it goes the learner that was measured, which the code in the card loads: with the moments
    that the inner optimizer had gathered in training, as fresh ones give other accuracies.

    Args:
        run: a run that has trained; what was not measured since is not in the card.

    Raises:
        CheckpointError: it has not trained yet, or the learner cannot be written.
    """
    run.check_links()
    iteration = export(run, run.learner)
    config = run.config()
    recipe = config.recipe
    data, weights_license = _DATA.get(recipe.problem, _OTHER)
    arguments = f"num_classes={recipe.num_ways}"
    arguments += ", torch_defaults=True" if recipe.torch_defaults else ""
    network = f"koi.models.{_NETWORKS[recipe.network]}({arguments})"
    card = model_card(
        {
            "name": recipe.name,
            "description": _description(recipe),
            "license": weights_license,
            "model": network,
            "learner": _learner(run, recipe),
            "checkpoint": run.learner.name,
            "settings": _settings(recipe),
            "data": data,
            "command": _command(config),
            "versions": run.environment(),
        },
        list(_results(run, iteration)),
    )
    replace_file(run.folder / "README.md", card.encode())


def _description(recipe: FewShotRecipe) -> str:
    return (
        f"An initialisation from which a few gradient steps tell {recipe.num_ways} new classes of "
        "images apart, given a few examples of each."
    )


def _learner(run: Run, recipe: FewShotRecipe) -> str:
    num_steps = recipe.adaptation(min(recipe.adaptations)).num_steps
    if recipe.inner_optimizer == "sgd":
        return f'koi.Koi.load("{run.learner.name}", model, num_steps={num_steps})'
    return f"""koi.Koi.load(
    "{run.learner.name}",
    model,
    num_steps={num_steps},
    inner_optimizer=lambda params, lr: torch.optim.Adam(params, lr, betas=(0.0, 0.999)),
)"""


def _settings(recipe: FewShotRecipe) -> dict[str, Any]:
    """Return what the learner was given, code as the text of what it does."""
    settings = {key: value for key, value in recipe.settings().items() if key not in recipe.code()}
    settings["inner_optimizer"] = "SGD" if recipe.inner_optimizer == "sgd" else "Adam, β1 = 0"
    if recipe.meta_rate is not None:
        settings["meta_optimizer"] = f"Adam, rate {recipe.meta_rate:g}"
    return settings | {
        "episodes": f"{recipe.num_ways} ways, {recipe.num_shots} shots, {recipe.batch_size} a step"
    }


def _command(config: Config) -> str:
    recipe = config.recipe
    words = ["koi", "train", recipe.name]
    if config.classes is not None:
        words = ["koi", "train", "--data", "FOLDER", "--ways", str(recipe.num_ways)]
        words += ["--shots", str(min(recipe.adaptations)), "--network", recipe.network]
    words += ["--iterations", str(recipe.num_iterations), "--seed", str(config.seed)]
    words += ["--compile"] if config.compile else []
    return shlex.join(words)


def _results(run: Run, iteration: int) -> Any:
    """Yield each accuracy that was measured after so many meta-iterations.

    Test classes are never those of the training.
    """
    ways = run.config().recipe.num_ways
    for num_shots, result in run.results().items():
        if result["iteration"] != iteration:
            continue
        for way in ("inductive", "transductive"):
            mean, interval = result[way]
            yield {
                "task": f"{ways}-way {num_shots}-shot, {way}",
                "metric": "accuracy",
                "value": mean,
                "interval": interval,
                "num_skipped": result.get("num_skipped", 0),
            }
