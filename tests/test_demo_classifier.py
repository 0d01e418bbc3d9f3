"""The network of the demo: what it adapts, from where, and which checkpoint it is of."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koi import Koi, SupervisedTask, linear
from koi.errors import CheckpointError
from koi.lab.demo.classifier import Classifier, Examples
from koi.lab.runs import export
from koi.lab.runs.folder import Config, Run
from koi.models import omniglot_net
from koi.recipes import RECIPES
from koi.recipes.fewshot import adam_without_momentum as adam


class Noise:
    """Five classes of random pictures."""

    def sample(self):
        x, y = torch.rand(10, 1, 28, 28), torch.arange(5).repeat(2)
        return SupervisedTask(x, y, x, y, torch.tensor(0), F.cross_entropy)


def learner(**settings):
    settings = {"inner_optimizer": adam, "num_iterations": 2, "seed": 0} | settings
    return Koi(omniglot_net(5), 1e-3, 2, meta_batch_size=2, **settings)


@pytest.fixture
def trained():
    koi = learner(meta_step_size=linear(1.0, 0.0))
    koi.train(Noise())
    return koi


@pytest.fixture
def images():
    return (torch.rand(3, 1, 28, 28) > 0.2).float()


def by_hand(net, images, query, num_steps, optimizer):
    """Losses and probabilities of three classes, as anybody would write it."""
    losses, probabilities = [], []
    for step in range(num_steps + 1):
        loss = F.cross_entropy(net(images)[:, :3], torch.tensor([0, 1, 2]))
        losses.append(loss.item())
        with torch.no_grad():
            scores = net(torch.cat([images, query[None]]))[3, :3]
        probabilities.append(scores.softmax(0).tolist())
        if step < num_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses, probabilities


def without_idle_biases(net):
    """The same function: a bias before normalisation only gives Adam rounding noise to follow."""
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            layer.bias.requires_grad_(False)
    return net


def test_a_random_start_is_plain_adam_on_the_examples(images):
    classifier = Classifier(learner())
    net = without_idle_biases(copy.deepcopy(classifier._learners["random"].model))
    answer = classifier.answer(images, images[1], 3, "random")
    optimizer = adam([p for p in net.parameters() if p.requires_grad], 1e-3)
    losses, probabilities = by_hand(net, images, images[1], 3, optimizer)
    torch.testing.assert_close(answer.losses, losses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(answer.probabilities, probabilities, rtol=1e-3, atol=1e-3)


def test_a_learned_start_is_phi_and_the_gathered_moments(trained, images):
    """One step from other moments, or from other weights, is another one."""
    answer = Classifier(trained).answer(images, images[1], 1, "learned")
    with torch.no_grad():
        at_phi = F.cross_entropy(trained.model(images)[:, :3], torch.arange(3)).item()
    fresh = Koi(copy.deepcopy(trained.model), 1e-3, inner_optimizer=adam)
    other = Classifier(fresh).answer(images, images[1], 1, "learned")
    assert answer.losses[0] == other.losses[0] == at_phi
    assert answer.losses[1] != other.losses[1]


def test_shorter_adaptations_are_beginnings_of_longer_ones(trained, images):
    """So that one answer serves every position of the slider."""
    classifier = Classifier(trained)
    short = classifier.answer(images, images[0], 2, "learned")
    long = classifier.answer(images, images[0], 4, "learned")
    assert len(long.losses) == len(long.probabilities) == 5
    assert short.losses == long.losses[:3]
    assert short.probabilities == long.probabilities[:3]


def test_an_answer_leaves_everything_as_it_was(trained, images):
    classifier = Classifier(trained)
    before = copy.deepcopy(trained.model.state_dict())
    state = torch.get_rng_state()
    first = classifier.answer(images, images[0], 3, "learned")
    classifier.answer(images, None, 3, "random")
    assert classifier.answer(images, images[0], 3, "learned") == first
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_a_query_there_are_losses_alone(trained, images):
    classifier = Classifier(trained)
    answer = classifier.answer(images, None, 2, "learned")
    assert answer.losses == classifier.answer(images, images[0], 2, "learned").losses
    assert answer.probabilities == []


def test_three_classes_adapt_the_network_with_two_rows_cut_off(trained, images):
    """The other outputs keep their weights, and those of a smaller network change as here."""
    adapted = trained.adapt(Examples(images, None), 3)
    before, after = trained.model[-1], adapted[-1]
    assert torch.equal(after.weight[3:], before.weight[3:])
    assert torch.equal(after.bias[3:], before.bias[3:])
    assert not torch.equal(after.weight[:3], before.weight[:3])

    cut = copy.deepcopy(trained.model)
    cut[-1].weight, cut[-1].bias = (nn.Parameter(p[:3].clone()) for p in before.parameters())
    small = Koi(without_idle_biases(cut), 1e-3, inner_optimizer=adam)
    whole = Koi(without_idle_biases(copy.deepcopy(trained.model)), 1e-3, inner_optimizer=adam)
    answers = [koi.adapt(Examples(images, None), 3)(images)[:, :3] for koi in (small, whole)]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


class TestLoading:
    def test_a_checkpoint_of_the_paper_s_settings(self, trained, images, tmp_path):
        trained.save(tmp_path / "koi.safetensors")
        loaded = Classifier.load(tmp_path / "koi.safetensors")
        assert (loaded.num_outputs, loaded.num_tasks) == (5, 4)
        expected = Classifier(trained).answer(images, images[2], 2, "learned")
        assert loaded.answer(images, images[2], 2, "learned") == expected

    def test_a_checkpoint_without_code_keeps_its_own_optimizer(self, images, tmp_path):
        koi = learner(inner_optimizer="sgd")
        koi.save(tmp_path / "koi.safetensors")
        loaded = Classifier.load(tmp_path / "koi.safetensors")
        expected = Classifier(koi).answer(images, images[2], 2, "learned")
        assert loaded.answer(images, images[2], 2, "learned") == expected

    @pytest.mark.parametrize(
        ("name", "epsilon", "method"),
        [
            ("omniglot-5way", 1e-3, ("Reptile", "Adam")),
            ("omniglot-5way-koi", 1e-5, ("MAML", "SGD")),
        ],
    )
    def test_of_a_run_the_newest_checkpoint(self, name, epsilon, method, images, tmp_path):
        """As folder, checkpoint and exported: the same network, also in what no checkpoint has."""
        recipe = replace(RECIPES[name], num_iterations=2, num_steps=2, meta_batch_size=2)
        run = Run.begun(tmp_path / "run", Config(recipe))
        koi = Koi(recipe.model(), **recipe.settings(), seed=0)
        koi.train(Noise(), checkpoint_dir=run.checkpoints, checkpoint_every=1)
        files = sorted(run.checkpoints.glob("*.safetensors"))
        assert len(files) == 2
        export(run, tmp_path / "exported.safetensors")
        expected = Classifier(koi, torch_defaults=recipe.torch_defaults)
        for path in (run.folder, files[-1], tmp_path / "exported.safetensors"):
            loaded = Classifier.load(path)
            assert loaded.num_tasks == 4
            assert (loaded.algorithm, loaded.optimizer) == method
            for start in ("learned", "random"):
                assert loaded._learners[start].model[1].eps == epsilon
                assert loaded.answer(images, images[2], 1, start) == expected.answer(
                    images, images[2], 1, start
                )

    def test_a_folder_without_checkpoints(self, tmp_path):
        with pytest.raises(CheckpointError, match="is a folder without a run"):
            Classifier.load(tmp_path)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match="is not there: give the folder of a run"):
            Classifier.load(tmp_path / "nothing.safetensors")

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            (nn.Sequential(nn.Linear(4, 5)), "is of another network: give"),
            (omniglot_net(2), "2 classes apart: give one for at least 3"),
        ],
    )
    def test_the_checkpoint_of_another_network(self, model, said, tmp_path):
        Koi(model).save(tmp_path / "koi.safetensors")
        with pytest.raises(CheckpointError, match=said):
            Classifier.load(tmp_path / "koi.safetensors")
