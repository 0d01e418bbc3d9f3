"""A setting is written once: all that is made of it follows."""

import inspect
import pydoc
from copy import deepcopy
from dataclasses import FrozenInstanceError, dataclass, fields, replace

import pytest
import torch
from torch import nn

from koi import CheckpointError, ConfigurationError, Koi, linear
from koi.allowed import number
from koi.configured import documented, takes
from koi.settings import Settings, setting
from toys import InTurn, Point, Quadratic, Regressions, small_net


@dataclass(frozen=True, kw_only=True)
class More(Settings):
    warmth: float = setting(1.0, number(), "how warm the pond is.", engines=True)


@documented(More)
class Warm(Koi):
    """A learner with one setting more.

    Args:
        model: any module.
        settings: those of `More`.
    """

    @takes(More)
    def __init__(self, model, settings):
        Koi.__init__.__wrapped__(self, model, settings)


class TestOneSettingMore:
    def test_signature(self):
        parameter = inspect.signature(Warm).parameters["warmth"]
        assert (parameter.default, parameter.kind) == (1.0, parameter.KEYWORD_ONLY)

    def test_help(self):
        text = pydoc.plain(pydoc.render_doc(Warm))
        assert "warmth: how warm the pond is." in text
        assert "warmth: float = 1.0" in text

    def test_check(self):
        with pytest.raises(ConfigurationError) as caught:
            Warm(None, num_steps=0, warmth=-1)
        named = [problem.split(" = ")[0] for problem in caught.value.problems]
        assert named == ["model", "num_steps", "warmth"]

    def test_attribute(self):
        koi = Warm(nn.Linear(1, 1), warmth=2)
        assert (koi.warmth, type(koi.warmth), "warmth" in dir(koi)) == (2.0, float, True)
        with pytest.raises(ConfigurationError, match="warmth = nan: must be a finite number"):
            koi.warmth = float("nan")
        koi.warmth = 3.0
        assert koi.settings == More(warmth=3.0)
        assert repr(koi) == "Warm(Linear, warmth=3.0, iteration=0)"

    def test_checkpoint(self, tmp_path):
        koi = Warm(nn.Linear(1, 1), warmth=2.0)
        koi.save(tmp_path / "koi")
        assert Warm.load(tmp_path / "koi", nn.Linear(1, 1)).warmth == 2.0
        with pytest.raises(CheckpointError, match=r"warmth: 2\.0 in the checkpoint, 1\.0 here"):
            Warm(nn.Linear(1, 1)).load_state_dict(koi.state_dict())

    def test_checkpoint_of_before_and_of_later(self, tmp_path):
        """A setting that was not there yet is at its default; one that is unknown is refused."""
        Koi(nn.Linear(1, 1)).save(tmp_path / "before")
        assert Warm.load(tmp_path / "before", nn.Linear(1, 1)).warmth == 1.0
        warm = Warm(nn.Linear(1, 1))
        warm.save(tmp_path / "later")
        with pytest.raises(CheckpointError, match=r"does not know \(warmth\)"):
            Koi.load(tmp_path / "later", nn.Linear(1, 1))
        with pytest.raises(CheckpointError, match=r"warmth: .* no setting of this Koi"):
            Koi(nn.Linear(1, 1)).load_state_dict(warm.state_dict())

    def test_engines(self):
        """Their key is made of it."""
        koi = Warm(nn.Linear(1, 1))
        before = koi.settings.of_engines()
        koi.warmth = 2.0
        assert koi.settings.of_engines() != before


def test_all_are_in_the_help():
    text = pydoc.plain(pydoc.render_doc(Koi))
    signature = inspect.signature(Koi)
    for each in fields(Settings):
        assert f"  {each.name}: {each.metadata['doc'][:10]}" in text
        assert signature.parameters[each.name].default == each.default
    assert list(signature.parameters) == ["model", *(each.name for each in fields(Settings))]


def test_first_three_by_place():
    kinds = [p.kind for p in inspect.signature(Koi).parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4 + [
        inspect.Parameter.KEYWORD_ONLY
    ] * (len(kinds) - 4)


@pytest.mark.parametrize(
    ("arguments", "named", "says"),
    [
        ((), {"stepsize": 0.1}, r"Koi: .*'stepsize'; did you mean \"step_size\"\?"),
        ((1, 2, 3, 4), {}, "Koi: too many positional arguments"),
    ],
)
def test_arguments_that_there_are_not(arguments, named, says):
    with pytest.raises(TypeError, match=says):
        Koi(nn.Linear(1, 1), *arguments, **named)
    with pytest.raises(TypeError, match="'model'"):
        Koi()


def test_repr_has_what_is_not_as_usual():
    koi = Koi(small_net(), 0.1, meta_step_size=linear(1.0, 0.0), inner_optimizer=torch.optim.SGD)
    assert repr(koi) == (
        "Koi(Sequential, step_size=0.1, inner_optimizer=code (SGD), "
        "meta_step_size=linear(start=1.0, end=0.0), iteration=0)"
    )


def test_several_at_once():
    koi = Koi(nn.Linear(1, 1))
    koi.settings = replace(koi.settings, step_size=0.5, num_steps=3)
    assert (koi.step_size, koi.num_steps, koi.num_iterations) == (0.5, 3, 1000)
    with pytest.raises(ConfigurationError, match="settings = None: must be made by"):
        koi.settings = None
    with pytest.raises(FrozenInstanceError):
        koi.settings.step_size = 0.1


def test_attributes_that_there_are_not():
    koi = Koi(nn.Linear(1, 1))
    with pytest.raises(AttributeError, match="Koi has no attribute 'step_sze'"):
        koi.step_sze  # noqa: B018
    assert not hasattr(koi, "__deepcopy__")
    assert deepcopy(koi).settings == koi.settings


def test_what_is_set_in_the_middle_waits_for_the_next_meta_iteration():
    """Wholly: also where a task sets it while it is adapted to."""
    koi = Koi(Point(4.0), 0.25, 2, 2, meta_step_size=1.0)

    class Setting(Quadratic):
        def loss(self, model):
            koi.step_size, koi.num_steps, koi.meta_step_size = 0.5, 1, 0.5
            return super().loss(model)

    koi.train(InTurn(Setting(0.0)))
    first, second = koi.history
    assert (first.meta_step_size, second.meta_step_size) == (1.0, 0.5)
    assert second.loss_before == pytest.approx(first.loss_before * (1 - 0.25) ** 4)
    assert koi.model.weight.item() == pytest.approx(4 * 0.75**2 * 0.75)


def test_another_inner_optimizer_starts_without_moments():
    koi = Koi(small_net(), inner_optimizer="adam", num_iterations=1)
    koi.train(Regressions())
    assert koi.state_dict()["moments"]
    koi.inner_optimizer = "adam"
    assert koi.state_dict()["moments"]
    koi.inner_optimizer = torch.optim.RMSprop
    assert koi.state_dict()["moments"] is None
