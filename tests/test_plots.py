"""What the pictures show, read off the figures."""

import math

import pytest
import torch

from koi import Evaluation, Record, plots


def record(iteration, before, after):
    return Record(iteration, before, after, 0.1, 1.0, 0.01)


def points(line):
    return list(line.get_xdata()), list(line.get_ydata())


def test_loss_curve_draws_means_of_neighbours():
    """100 meta-iterations are 50 means of two; a skipped one has no loss and is left out."""
    history = [record(i, 2.0 * i, 1.0) for i in range(100)]
    history[1] = record(1, math.nan, math.nan)
    before, after = plots.loss_curve(history).axes[0].lines
    middles, losses = points(before)
    assert middles[:3] == [0.5, 2.5, 4.5]
    assert losses[:3] == [0.0, 5.0, 9.0]
    assert points(after)[1] == [1.0] * 50


def test_loss_curve_of_a_single_meta_iteration():
    before, _ = plots.loss_curve([record(0, 3.0, 1.0)]).axes[0].lines
    assert points(before) == ([0.0], [3.0])


def test_loss_curve_of_nothing_is_refused():
    with pytest.raises(ValueError, match="train first"):
        plots.loss_curve([])


@pytest.mark.parametrize(("least", "scale"), [(1.0, "linear"), (0.01, "log")])
def test_adaptation_curves_show_means_on_an_axis_that_fits(least, scale):
    curve = Evaluation(torch.tensor([[4.0, 2 * least], [2.0, 0.0]]))
    axes = plots.adaptation_curves({"learned": curve}, ylabel="error").axes[0]
    assert points(axes.lines[0]) == ([0, 1], [3.0, pytest.approx(least)])
    assert (axes.get_yscale(), axes.get_ylabel()) == (scale, "error")


def test_episode_grid_tells_right_from_wrong_by_more_than_colour():
    """Class 0 is answered rightly, class 1 is taken for class 0."""
    images, classes = torch.rand(2, 1, 8, 8), torch.arange(2)
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    figure = plots.episode_grid(images, classes, images, classes, scores, ["cat", "dog"])
    asked = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_xlabel() for axes in asked] == ["cat  73 %", "cat  73 %"]
    assert [axes.spines["left"].get_linestyle() for axes in asked] == ["-", "--"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["cat", "dog"]


def test_episode_grid_takes_colour_images_long_names_and_many_of_them():
    images, classes = torch.rand(14, 3, 8, 8), torch.arange(2).repeat(7)
    names = ["a name that goes on and on", "b"]
    figure = plots.episode_grid(images, classes, images, classes, torch.zeros(14, 2), names)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 2 * (5 + 5)
    assert figure.axes[0].get_ylabel() == "a name that g…"


def test_a_figure_is_written(tmp_path):
    for suffix in plots.SUFFIXES:
        path = tmp_path / f"picture{suffix}"
        plots.save(plots.loss_curve([record(0, 3.0, 1.0)]), path)
        assert path.stat().st_size > 1000


def test_learning_curve_counts_from_zero_in_whole_numbers():
    """A single point had stood among 57, 58, 60, 62 and 63."""
    figure = plots.learning_curve([{"iteration": 60, "1-shot inductive": 0.8}], {})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_xlim()[0] == 0
    labels = {
        tick.get_text(): place
        for tick, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
    }
    assert all(float(text.replace(",", "")) == place for text, place in labels.items())
