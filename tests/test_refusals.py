"""What cannot work is refused by name: modules, modes of torch around a call, sparse gradients."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import koi
from koi import ConfigurationError, Koi, ModelError
from toys import InTurn, Regressions, assert_close, assert_same, small_net, snapshot

SETTINGS = {"step_size": 0.05, "num_steps": 3, "num_iterations": 3, "seed": 0}


def loss(model, task):
    return task.loss(model)


CALLS = {
    "train": lambda koi: koi.train(Regressions()),
    "adapt": lambda koi: koi.adapt(Regressions().sample()),
    "evaluate": lambda koi: koi.evaluate(Regressions(), num_tasks=2),
    "measure": lambda koi: koi.measure(Regressions(), loss, num_tasks=2),
}


class Around(nn.Module):
    """A module around another."""

    def __init__(self, part):
        super().__init__()
        self.encoder = part
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class TestScripted:
    @pytest.mark.parametrize(
        "make", [torch.jit.script, partial(torch.jit.trace, example_inputs=torch.ones(1, 3))]
    )
    def test_whole_or_in_part(self, make):
        scripted = make(small_net())
        with pytest.raises(ModelError, match=r"as it is a torch\.jit\.ScriptModule.*plain module"):
            Koi(scripted)
        with pytest.raises(ModelError, match=r"its part 'encoder' is a torch\.jit\.ScriptModule"):
            Koi(Around(scripted))
        assert Koi(Around(small_net()), **SETTINGS).train(Regressions())


class TestHooks:
    """A copy of a parameter has none of its hooks."""

    @pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_refused_until_they_are_removed(self, method):
        model = small_net()
        hook = getattr(model[2].weight, method)(lambda tensor: None)
        with pytest.raises(ModelError, match=r"hooks on its parameters \(2\.weight\).*mask"):
            Koi(model)
        hook.remove()
        Koi(model, **SETTINGS).train(Regressions())

    def test_of_frozen_parameters_do_nothing(self):
        model = small_net()
        model[0].weight.register_hook(lambda grad: 0 * grad)
        model[0].weight.requires_grad_(False)
        Koi(model, **SETTINGS).train(Regressions())

    def test_registered_after_the_learner_was_made(self):
        koi = Koi(small_net(), **SETTINGS)
        koi.model[0].weight.register_hook(lambda grad: 0 * grad)
        with pytest.raises(ModelError, match="hooks on its parameters"):
            koi.train(Regressions())


class TestInferenceMode:
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_around_a_call(self, call):
        koi = Koi(small_net(), **SETTINGS)
        before = snapshot(koi.model)
        with (
            torch.inference_mode(),
            pytest.raises(ConfigurationError, match=r"inference_mode\(\) is on.*torch\.no_grad"),
        ):
            call(koi)
        assert_same(koi.model, before)
        with torch.no_grad():
            call(koi)

    def test_around_predictions(self):
        koi = Koi(small_net())
        with torch.inference_mode():
            assert koi(torch.ones(1, 3)).shape == (1, 2)

    @pytest.mark.parametrize("make", [small_net, lambda: nn.BatchNorm1d(3)])
    def test_where_the_model_was_made(self, make):
        with torch.inference_mode():
            model = make()
        with pytest.raises(ModelError, match=r"made under torch\.inference_mode\(\) \(.*weight"):
            Koi(model)

    def test_where_a_buffer_was_made(self):
        model = small_net()
        with torch.inference_mode():
            model.register_buffer("scale", torch.ones(2))
        with pytest.raises(ModelError, match=r"inference_mode\(\) \(scale\)"):
            Koi(model)

    def test_where_a_task_was_made(self):
        with torch.inference_mode():
            task = Regressions().sample()
        koi = Koi(small_net(), **SETTINGS)
        for call in (koi.adapt, lambda task: koi.train(InTurn(task))):
            with pytest.raises(RuntimeError, match="nference tensor") as caught:
                call(task)
            assert any("task holds tensors that were made" in n for n in caught.value.__notes__)


class TestAutocast:
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_around_a_call(self, call):
        koi = Koi(small_net(), **SETTINGS)
        before = snapshot(koi.model)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ConfigurationError, match=r"give autocast=torch\.bfloat16 to Koi"),
        ):
            call(koi)
        assert_same(koi.model, before)

    def test_that_is_off_or_of_another_device(self):
        with torch.autocast("cpu", enabled=False):
            Koi(small_net(), **SETTINGS).train(Regressions())

    def test_of_the_learner(self):
        koi = Koi(small_net(), autocast=torch.bfloat16, **SETTINGS)
        for call in CALLS.values():
            call(koi)


@koi.tensor_task
@dataclass
class Words:
    """Embedded words, each of which should have its target."""

    words: Tensor
    targets: Tensor

    def loss(self, model):
        return F.mse_loss(model(self.words), self.targets)


class Texts:
    def sample(self):
        return Words(torch.randint(0, 7, (5,)), torch.randn(5, 2))


def embedder(sparse):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 3, sparse=sparse), nn.Linear(3, 2))


class TestSparseGradients:
    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("optimizer", ["sgd", partial(torch.optim.SGD, momentum=0.9)])
    @pytest.mark.parametrize("meta_optimizer", [None, torch.optim.Adam])
    def test_fomaml_is_that_of_the_dense_twin(self, meta_optimizer, optimizer):
        settings = {"algorithm": "fomaml", "inner_optimizer": optimizer, "meta_batch_size": 2}
        settings |= {"meta_optimizer": meta_optimizer, "vectorize": False, **SETTINGS}
        models = [embedder(sparse) for sparse in (True, False)]
        start = deepcopy(models[0])
        for model in models:
            Koi(model, **settings).train(Texts())
        assert_close(*models)
        assert not torch.equal(models[0][0].weight, start[0].weight)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                {"algorithm": "maml"},
                r"algorithm='maml' does not .* Embedding '0'.*algorithm='fomaml'",
            ),
            ({"inner_optimizer": "adam"}, r"Adam inside does not .* Embedding '0'.*sparse=False"),
            ({"inner_optimizer": torch.optim.AdamW}, "AdamW inside does not .* Embedding '0'"),
        ],
    )
    def test_refused_where_torch_has_no_rule_for_them(self, settings, words):
        with pytest.raises(ConfigurationError, match=words):
            Koi(embedder(sparse=True), **settings)
        Koi(embedder(sparse=False), **settings)
        frozen = embedder(sparse=True)
        frozen[0].requires_grad_(False)
        Koi(frozen, **settings, num_iterations=1).train(Texts())
