"""The recipes hold the paper's hyper-parameters, and are data."""

import json

import pytest
import torch
from torch.nn import functional as F

from koi import ConfigurationError, Koi
from koi.fewshot import LabelledData
from koi.phi.schedules import linear
from koi.recipes import RECIPES, FewShotRecipe, recipe_named
from koi.recipes.fewshot import PAPER, adam_without_momentum

# Tables of appendix A of arXiv 1803.02999: inner rate, inner batch, inner steps, training shots,
# meta-iterations; evaluation batch and steps with 1 shot, with 5.
APPENDIX = {
    "omniglot-5way": (5, 0.001, 10, 5, 10, 100_000, (5, 50), (5, 50)),
    "omniglot-20way": (20, 0.0005, 20, 10, 10, 200_000, (10, 50), (10, 50)),
    "mini-imagenet-5way": (5, 0.001, 10, 8, 15, 100_000, (5, 50), (15, 50)),
}


@pytest.mark.parametrize("name", APPENDIX)
def test_hyper_parameters_are_the_papers(name):
    recipe = RECIPES[name]
    ways, rate, batch, steps, shots, iterations, one, five = APPENDIX[name]
    settings = recipe.settings()
    assert settings["step_size"] == rate
    assert settings["num_steps"] == steps
    assert settings["num_iterations"] == iterations
    assert settings["meta_step_size"] == linear(1.0, 0.0)
    assert settings["meta_batch_size"] == 5
    assert settings["inner_state"] == "carry"
    assert settings["algorithm"] == "reptile"
    data = LabelledData(torch.rand(20 * 20, 3), [f"{i}" for i in range(20)], [20] * 20)
    episodes = recipe.training_episodes(data)
    assert (episodes.num_ways, episodes.num_shots, episodes.batch_size) == (ways, shots, batch)
    for num_shots, adaptation in ((1, one), (5, five)):
        episodes = recipe.test_episodes(data, num_shots)
        assert (episodes.batch_size, recipe.adaptation(num_shots).num_steps) == adaptation
        assert (episodes.num_ways, episodes.num_shots, episodes.num_queries) == (ways, num_shots, 1)


def test_the_inner_optimizer_is_adam_without_its_first_moment():
    (group,) = adam_without_momentum([torch.zeros(1, requires_grad=True)], 0.5).param_groups
    assert (group["betas"], group["lr"], group["weight_decay"]) == ((0.0, 0.999), 0.5, 0)


def test_shots_that_a_recipe_does_not_name():
    recipe = RECIPES["mini-imagenet-5way"]
    assert recipe.adaptation(3) == recipe.adaptation(1)
    assert recipe.adaptation(9) == recipe.adaptation(5)


def test_recipes_are_data():
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert FewShotRecipe.from_data(json.loads(json.dumps(recipe.as_data()))) == recipe


def test_fomaml_and_maml_differ_from_reptile_in_the_meta_update_alone():
    reptile = RECIPES["omniglot-5way"].as_data()
    for algorithm in ("fomaml", "maml"):
        other = RECIPES[f"omniglot-5way-{algorithm}"].as_data()
        assert {k for k in reptile if reptile[k] != other[k]} == {
            "name",
            "algorithm",
            "num_queries",
            "meta_rate",
        }


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name):
    recipe = RECIPES[name]
    channels, side = (1, 28) if recipe.network == "omniglot" else (3, 84)
    shape = (recipe.num_ways * 20, channels, side, side)
    classes = [f"{i}" for i in range(recipe.num_ways)]
    data = LabelledData(torch.randint(256, shape, dtype=torch.uint8), classes, [20] * len(classes))
    model = recipe.model()
    before = [p.detach().clone() for p in model.parameters()]
    settings = recipe.settings() | {"num_iterations": 1, "num_steps": 2, "meta_batch_size": 3}
    koi = Koi(model, **settings, seed=0)
    koi.train(recipe.training_episodes(data))
    assert koi.engine == ("vectorized" if side == 28 else "eager")
    task = recipe.test_episodes(data, 1).sample()
    assert model(task.query_inputs).shape == (recipe.num_ways, recipe.num_ways)
    assert task.criterion is F.cross_entropy
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


def test_every_cell_of_the_papers_table_has_a_recipe():
    assert {name for name, _ in PAPER} == set(APPENDIX)
    assert all(1 <= shots in RECIPES[name].adaptations for name, shots in PAPER)


def test_a_recipe_that_is_not_there():
    with pytest.raises(ConfigurationError, match='did you mean "omniglot-5way"'):
        recipe_named("omniglot-5wy")
