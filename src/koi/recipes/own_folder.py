"""A few-shot recipe for any folder of images: the nearest of those that there are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from koi import allowed
from koi.errors import ConfigurationError, DataError, did_you_mean
from koi.fewshot import LabelledData
from koi.fewshot.sources import class_folders
from koi.recipes.fewshot import BESIDE, NETWORKS, RECIPES, Adaptation, FewShotRecipe

# "train", "validation" and "test" -> the names of the classes.
Parts = dict[str, list[str]]

# Enough for a folder of some hundred classes, by docs/uses/own-folder.md.
_NUM_ITERATIONS = 10_000
_PATIENCE = 6

_PART_NAMES = {"train", "training", "val", "valid", "validation", "test"}


def own_folder(
    folder: str | os.PathLike[str],
    num_ways: int = 5,
    num_shots: int = 1,
    network: str = "omniglot",
    seed: int = 0,
) -> tuple[FewShotRecipe, Parts]:
    """Return a recipe for a folder of class folders, and its classes in three parts.

    Its settings are those of the recipe with this network and the nearest number of ways, of our
    own if there is one, else of the paper; but for the length: there are 10,000 meta-iterations,
    and 6 validations in a row without a better one end the training. The paper's Reptile trains
    with as many shots as there, ours with one and 4 queries, if each class has so many images. No
    class is in two parts: a fifth of them, and at least num_ways, are for the test; as many are for
    validation, unless fewer than half would be left to learn from.

    Args:
        folder: a folder of images for each class; the images are not read.
        num_ways: classes in an episode.
        num_shots: support examples of each class in the test.
        network: one of `koi.recipes.NETWORKS`; it decides what images become.
        seed: chooses the classes of each part.

    Raises:
        ConfigurationError: there is no such network, or an argument that cannot work.
        DataError: the folder cannot be read, or has too few classes or images.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in "abcdefgh":
    ...         Path(root, name).mkdir()
    ...         for number in range(4):
    ...             Path(root, name, f"{number}.png").touch()
    ...     recipe, parts = own_folder(root, num_ways=2)
    >>> recipe.num_ways, recipe.num_shots, recipe.num_queries, recipe.algorithm
    (2, 1, 3, 'maml')
    >>> {part: len(names) for part, names in parts.items()}
    {'train': 4, 'validation': 2, 'test': 2}
    """
    allowed.check(
        folder=(folder, allowed.path),
        num_ways=(num_ways, allowed.count(1)),
        num_shots=(num_shots, allowed.count(1)),
        network=(network, allowed.text),
    )
    if network not in NETWORKS:
        near, known = did_you_mean(network, NETWORKS), ", ".join(NETWORKS)
        raise ConfigurationError([f"there is no network {network!r}{near} (networks: {known})"])
    counts = {name: len(files) for name, files in class_folders(Path(folder)).items()}
    _check(folder, counts, num_ways, num_shots)
    recipe = replace(
        _nearest(network, num_ways, num_shots, min(counts.values())),
        name=f"folder-{num_ways}way",
        problem="folder",
        num_iterations=_NUM_ITERATIONS,
        patience=_PATIENCE,
        num_ways=num_ways,
    )
    return recipe, _parts(list(counts), num_ways, seed)


def _nearest(network: str, num_ways: int, num_shots: int, fewest: int) -> FewShotRecipe:
    """Return the nearest recipe for test tasks of so many shots, with ``fewest`` images of a class.

    Of the paper's, training episodes have as many shots as there, or more if the test has; ours
    learn from one example of each class, and adapt to all that there are at each step.
    """
    recipes = [recipe for recipe in RECIPES.values() if recipe.network == network]
    ours = [recipe for recipe in recipes if recipe.name in BESIDE]
    # the first of those that are equally near
    nearest = min(ours or recipes, key=lambda recipe: abs(recipe.num_ways - num_ways))
    adaptation = nearest.adaptation(num_shots)
    if not ours:
        shots = min(max(nearest.num_shots, num_shots), fewest - 1)
        return replace(nearest, num_shots=shots, adaptations={num_shots: adaptation})
    all_of_them = max(adaptation.batch_size, num_ways * num_shots)
    return replace(
        nearest,
        num_queries=min(nearest.num_queries, fewest - nearest.num_shots),
        batch_size=all_of_them,
        adaptations={num_shots: Adaptation(all_of_them, adaptation.num_steps)},
    )


def _check(
    folder: str | os.PathLike[str], counts: Mapping[str, int], num_ways: int, num_shots: int
) -> None:
    """Raise an error if no episodes can be made, or those that were not meant."""
    roots = sorted({name.split("/")[0] for name in counts})
    if len(roots) > 1 and set(roots) <= _PART_NAMES:
        raise DataError(
            f"{folder} is in parts already ({', '.join(roots)}), whose folders would count as "
            "classes of their own: give a folder in which each class has one folder"
        )
    if len(counts) < 2 * num_ways:
        fewer = len(counts) // 2
        fits = f", or take {_at_most(fewer)} ways" if fewer >= 2 else ""
        raise DataError(
            f"{folder} has {len(counts)} classes and {num_ways}-way episodes need {2 * num_ways}, "
            f"{num_ways} to learn from and {num_ways} others for the test: add classes{fits}"
        )
    small = {name: count for name, count in counts.items() if count <= num_shots}
    if small:
        name = min(small, key=lambda name: small[name])
        fits = f", or take {_at_most(small[name] - 1)} shots" if small[name] > 1 else ""
        raise DataError(
            f"{len(small)} of {len(counts)} classes have fewer than {num_shots + 1} images (such "
            f"as {name!r}: {small[name]}) and {num_shots}-shot episodes need so many, {num_shots} "
            f"to learn from and one to be asked: add images, remove these classes{fits}"
        )


def _at_most(number: int) -> str:
    """Return a number as the largest that there can be.

    >>> _at_most(4), _at_most(1)
    ('at most 4', '1')
    """
    return f"at most {number}" if number > 1 else f"{number}"


def _parts(names: list[str], num_ways: int, seed: int) -> Parts:
    num_test = max(num_ways, len(names) // 5)
    num_validation = num_test if len(names) >= 4 * num_test else 0
    num_train = len(names) - num_test - num_validation
    whole = LabelledData(torch.arange(len(names)), names, [1] * len(names))
    test, validation, train = whole.split(num_test, num_validation, num_train, seed=seed)
    parts = {"train": train, "validation": validation, "test": test}
    return {part: list(data.classes) for part, data in parts.items()}
