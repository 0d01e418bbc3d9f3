"""The recipe for a folder of one's own: its parts, its shots, its settings."""

import pytest

from koi import ConfigurationError, DataError
from koi.recipes import RECIPES, own_folder


def empty_folder(root, counts):
    """Write class folders with files that nothing may read."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").touch()
    return root


@pytest.mark.parametrize(
    ("num_classes", "num_ways", "sizes"),
    [
        (10, 5, [5, 0, 5]),
        (19, 5, [14, 0, 5]),
        (20, 5, [10, 5, 5]),
        (100, 5, [60, 20, 20]),
        (80, 20, [40, 20, 20]),
        (4, 2, [2, 0, 2]),
    ],
)
def test_parts(tmp_path, num_classes, num_ways, sizes):
    names = [f"class {number}" for number in range(num_classes)]
    folder = empty_folder(tmp_path / "images", dict.fromkeys(names, 2))
    _, parts = own_folder(folder, num_ways)
    assert [len(parts[part]) for part in ("train", "validation", "test")] == sizes
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert parts == own_folder(folder, num_ways)[1]
    assert any(parts != own_folder(folder, num_ways, seed=seed)[1] for seed in range(1, 9))


@pytest.mark.parametrize(
    ("num_images", "num_shots", "trained_with"),
    [(2, 1, 1), (6, 1, 5), (11, 5, 10), (40, 5, 15), (40, 20, 20), (16, 15, 15)],
)
def test_training_shots_are_the_papers_where_there_are_so_many(
    tmp_path, num_images, num_shots, trained_with
):
    counts = {**dict.fromkeys("abcdefghi", 50), "small": num_images}
    folder = empty_folder(tmp_path / "images", counts)
    recipe, _ = own_folder(folder, 5, num_shots, network="mini-imagenet")
    assert recipe.num_shots == trained_with
    assert list(recipe.adaptations) == [num_shots]


@pytest.mark.parametrize(
    ("num_images", "num_shots", "num_queries"), [(2, 1, 1), (4, 1, 3), (40, 1, 4), (40, 15, 4)]
)
def test_our_recipe_learns_from_one_example_and_asks_of_what_there_is(
    tmp_path, num_images, num_shots, num_queries
):
    counts = {**dict.fromkeys("abcdefghi", 50), "small": num_images}
    recipe, _ = own_folder(empty_folder(tmp_path / "images", counts), 5, num_shots)
    assert (recipe.num_shots, recipe.num_queries) == (1, num_queries)
    assert list(recipe.adaptations) == [num_shots]


@pytest.mark.parametrize(
    ("network", "num_ways", "nearest"),
    [
        ("omniglot", 2, "omniglot-5way-koi"),
        ("omniglot", 15, "omniglot-20way-koi"),
        ("mini-imagenet", 15, "mini-imagenet-5way"),
    ],
)
def test_settings_are_those_of_the_nearest_recipe(tmp_path, network, num_ways, nearest):
    folder = empty_folder(tmp_path / "images", {str(n): 30 for n in range(30)})
    recipe, _ = own_folder(folder, num_ways, network=network)
    for name in ("algorithm", "step_size", "batch_size", "num_steps", "num_shots", "num_queries"):
        assert getattr(recipe, name) == getattr(RECIPES[nearest], name)
    assert (recipe.num_iterations, recipe.patience) == (10_000, 6)
    assert recipe.adaptation(1) == RECIPES[nearest].adaptation(1)
    assert recipe.num_ways == num_ways


@pytest.mark.parametrize(("num_ways", "num_shots"), [(5, 10), (30, 5)])
def test_all_examples_are_adapted_to_at_each_step(tmp_path, num_ways, num_shots):
    folder = empty_folder(tmp_path / "images", {str(n): 20 for n in range(60)})
    recipe, _ = own_folder(folder, num_ways, num_shots)
    assert recipe.batch_size >= num_ways
    assert recipe.adaptation(num_shots).batch_size == num_ways * num_shots


def test_a_folder_that_is_in_parts_already_would_have_each_class_twice(tmp_path):
    names = [f"{part}/{name}" for part in ("train", "val") for name in "abcde"]
    folder = empty_folder(tmp_path / "images", dict.fromkeys(names, 3))
    with pytest.raises(DataError, match=r"is in parts already \(train, val\)"):
        own_folder(folder)
    assert own_folder(folder / "train", num_ways=2)


def test_an_unknown_network(tmp_path):
    with pytest.raises(ConfigurationError, match="no network 'resnet'"):
        own_folder(tmp_path, network="resnet")
