"""The experiments of the paper, as data."""

from koi.recipes.fewshot import RECIPES, Adaptation, FewShotRecipe, recipe_named
from koi.recipes.sine import Recipe, sine

__all__ = ["RECIPES", "Adaptation", "FewShotRecipe", "Recipe", "recipe_named", "sine"]
