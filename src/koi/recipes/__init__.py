"""The experiments of the paper, as data, and the same for one's own images."""

from koi.recipes.fewshot import (
    IMAGE_FORMS,
    NETWORKS,
    RECIPES,
    Adaptation,
    FewShotRecipe,
    recipe_named,
)
from koi.recipes.own_folder import Parts, own_folder
from koi.recipes.sine import Recipe, sine

__all__ = [
    "IMAGE_FORMS",
    "NETWORKS",
    "RECIPES",
    "Adaptation",
    "FewShotRecipe",
    "Parts",
    "Recipe",
    "own_folder",
    "recipe_named",
    "sine",
]
