"""Algorithms as files: Eigen-Reptile by hand, and algorithms of a user's own in every engine."""

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import koi
import naive
import rank_runs
from engine_toys import ENGINES, SETTINGS, Fit, Fits, assert_agree, everything, mlp, trained
from koi import CheckpointError, ConfigurationError, Koi
from koi.algorithms import (
    MAML,
    Adaptation,
    AgainstGradient,
    EigenReptile,
    Reptile,
    TowardsPoint,
)
from ranks import Pool
from toys import InTurn, Point, Quadratic

pytestmark = [
    pytest.mark.usefixtures("float64", "one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def along(*points):
    """Return what Eigen-Reptile gives of a way through these points, as one vector."""
    path = [[torch.tensor(point)] for point in points]
    (given,) = EigenReptile().gives(Adaptation(path[0], path[-1], path, []))
    return given


class TestEigenReptile:
    def test_by_hand(self):
        """The scatter is diag(2, 1/6): e = (1, 0), s = 2 / (2 + 1/6) = 12/13, ζ = 2."""
        given = along([5.0, 7.0], [6.0, 7.5], [7.0, 7.0])
        assert given.tolist() == pytest.approx([5 + 24 / 13, 7.0], rel=1e-14)

    def test_length_counts_the_way_back(self):
        """On one line s = 1; the way is 3 − (−1) + 1 long, where φ̃ is 2 away."""
        assert along([0.0], [3.0], [2.0]).tolist() == pytest.approx([4.0], rel=1e-14)

    def test_points_onwards_whatever_the_sign(self):
        for sign in (1.0, -1.0):
            given = along([0.0, 0.0], [sign, 0.1], [2 * sign, -0.1], [3 * sign, 0.0])
            assert sign * given[0] > 2.9

    @pytest.mark.filterwarnings("ignore:num_steps = 1")
    def test_one_inner_step_is_reptile(self):
        one, other = (
            trained("eager", mlp_of_seed(0), Fits(), num_steps=1, algorithm=algorithm)
            for algorithm in ("eigen-reptile", "reptile")
        )
        torch.testing.assert_close(one.model.state_dict(), other.model.state_dict())

    @pytest.mark.filterwarnings("ignore:the meta-update is exactly zero")
    def test_a_task_that_moves_nothing(self):
        model = Point(1.0, 2.0)
        Koi(model, algorithm="eigen-reptile", num_iterations=2).train(InTurn(Quadratic([1.0, 2.0])))
        assert model.weight.tolist() == [1.0, 2.0]

    def test_what_is_not_finite_is_handed_on(self):
        assert not along([0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0]).isfinite().any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision(self, dtype):
        path = [[torch.tensor(p, dtype=dtype)] for p in ([0.0, 0.0], [1.0, 0.5], [2.0, 0.0])]
        (given,) = EigenReptile().gives(Adaptation(path[0], path[-1], path, []))
        assert given.dtype is dtype
        assert given.tolist() == pytest.approx([24 / 13, 0.0], abs=0.01)

    def test_all_parameters_are_one_vector(self):
        """By the singular values of a random way through 20 numbers, in three tensors."""
        shapes = [(3, 4), (), (7,)]
        path = [[torch.randn(shape) for shape in shapes] for _ in range(6)]
        given = EigenReptile().gives(Adaptation(path[0], path[-1], path, []))
        against = naive.against_main_direction(path)
        expected = [start - g for start, g in zip(path[0], against, strict=True)]
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


def mlp_of_seed(seed):
    torch.manual_seed(seed)
    return mlp()


@dataclass(frozen=True)
class InPlace(TowardsPoint):
    """Halfway, written as it must not be: in the memory of φ."""

    def gives(self, task):
        for start, end in zip(task.start, task.end, strict=True):
            start.lerp_(end, 0.5)
        return task.start


@dataclass(frozen=True)
class Halfway(TowardsPoint):
    """Towards a point on the way to φ̃."""

    share: float = 0.5

    def gives(self, task):
        pairs = zip(task.start, task.end, strict=True)
        return [start + self.share * (end - start) for start, end in pairs]


@dataclass(frozen=True)
class Averaged(TowardsPoint):
    """Towards the mean of all that the inner loop passed, less a step on the query loss."""

    trajectory: ClassVar[bool] = True
    query_gradient: ClassVar[bool] = True

    def gives(self, task):
        means = [torch.stack(points).mean(0) for points in zip(*task.path, strict=True)]
        return [mean - 0.1 * g for mean, g in zip(means, task.gradient, strict=True)]


@dataclass(frozen=True)
class Clipped(AgainstGradient):
    """Against the second-order gradient, at most 1 long, and how far the way went."""

    query_gradient: ClassVar[bool] = True
    second_order: ClassVar[bool] = True
    trajectory: ClassVar[bool] = True

    def gives(self, task):
        length = sum(g.square().sum() for g in task.gradient).sqrt()
        steps = sum((a - b).abs().sum() for a, b in zip(task.path[0], task.path[-1], strict=True))
        return [g / length.clamp(min=1.0) + 0.01 * steps for g in task.gradient]


OWN = [Halfway(), Halfway(0.25), Averaged(), Clipped()]


class TestOfAUsersOwn:
    @pytest.mark.parametrize("own", OWN, ids=repr)
    @pytest.mark.parametrize("meta", [None, torch.optim.Adam])
    @pytest.mark.usefixtures("untraced")
    def test_engines_agree(self, own, meta, caplog):
        net = mlp_of_seed(1)
        settings = {"algorithm": own, "meta_optimizer": meta, "inner_optimizer": "adam"}
        learners = [trained(engine, net, Fits(), **settings) for engine in ENGINES]
        for other in learners[1:]:
            assert_agree(learners[0], other)
        assert not [record for record in caplog.records if record.name == "koi"]

    @pytest.mark.parametrize(
        ("num_steps", "engine"),
        [
            (2, "compiled"),
            (20, "vectorized+compiled"),
            pytest.param(20, "compiled", marks=pytest.mark.slow),
            pytest.param(2, "vectorized+compiled", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.usefixtures("traced")
    def test_traced(self, engine, num_steps):
        """In one graph, and step by step."""
        net = mlp_of_seed(1)
        settings = {"algorithm": Averaged(), "num_steps": num_steps, "num_iterations": 2}
        assert_agree(
            trained("eager", net, Fits(), **settings), trained(engine, net, Fits(), **settings)
        )

    @pytest.mark.usefixtures("untraced")
    @pytest.mark.parametrize("engine", ["eager", "compiled"])
    def test_what_it_does_in_place_does_not_reach_phi(self, engine):
        one, other = (
            trained(engine, mlp_of_seed(3), Fits(), algorithm=algorithm)
            for algorithm in (InPlace(), Halfway())
        )
        assert_agree(one, other)
        model = mlp_of_seed(3)
        start = deepcopy(model.state_dict())
        with pytest.raises(koi.EngineError):
            Koi(model, algorithm=InPlace(), vectorize=True, **SETTINGS).train(Fits())
        torch.testing.assert_close(model.state_dict(), start, rtol=0, atol=0)

    def test_by_hand(self):
        """Halfway with ε is Reptile with ε / 2."""
        half = trained("eager", mlp_of_seed(2), Fits(), algorithm=Halfway())
        settings = {"algorithm": Reptile(), "meta_step_size": SETTINGS["meta_step_size"] / 2}
        reptile = trained("eager", mlp_of_seed(2), Fits(), **settings)
        torch.testing.assert_close(half.model.state_dict(), reptile.model.state_dict())

    def test_object_and_name_are_the_same(self):
        one, other = (
            trained("eager", mlp_of_seed(2), Fits(), algorithm=a) for a in (MAML(), "maml")
        )
        assert_agree(one, other, tolerance=0)

    def test_defaults_of_epsilon(self):
        for own, first in ((Halfway(), 1.0), (Clipped(), 0.02)):
            koi = Koi(mlp(), 0.02, num_iterations=1, algorithm=own)
            koi.train(Fits())
            assert koi.history[0].meta_step_size == first

    @pytest.mark.usefixtures("untraced")
    def test_changed_later(self):
        """An engine that is there already takes the new one, as a new learner would."""
        for engine in ENGINES:
            learner = trained(engine, mlp_of_seed(3), Fits())
            again = deepcopy(learner)
            learner.algorithm = Halfway(1.0)
            again.algorithm = "reptile"
            for one in (learner, again):
                one.num_iterations = 6
                one.train(Fits())
            torch.testing.assert_close(everything(learner)[0], everything(again)[0])

    def test_checkpoint(self, tmp_path):
        learner = trained("eager", mlp_of_seed(4), Fits(), algorithm=Halfway())
        learner.save(tmp_path / "koi")
        with pytest.raises(CheckpointError, match=r"code as algorithm \(Halfway\)"):
            Koi.load(tmp_path / "koi", mlp())
        loaded = Koi.load(tmp_path / "koi", mlp(), algorithm=Halfway())
        for one in (learner, loaded):
            one.num_iterations = 6
            one.train(Fits())
        assert_agree(learner, loaded, tolerance=0)

    def test_resumed(self, tmp_path):
        def run(num_iterations, folder):
            koi = Koi(mlp_of_seed(5), algorithm=Averaged(), **SETTINGS)
            koi.num_iterations = num_iterations
            koi.train(Fits(), checkpoint_dir=folder, resume=True)
            return koi

        run(2, tmp_path / "two")
        other = Koi(mlp(), **SETTINGS)
        with pytest.raises(CheckpointError, match="algorithm: code"):
            other.train(Fits(), checkpoint_dir=tmp_path / "two", resume=True)
        assert_agree(run(4, tmp_path / "two"), run(4, tmp_path / "one"), tolerance=0)

    def test_on_ranks(self):
        settings = {"algorithm": Averaged(), "meta_batch_size": 5}
        alone = rank_runs.in_engine(0, "vectorized", "mlp", settings)
        pool = Pool(2)
        try:
            for rank in pool(2, rank_runs.in_engine, "vectorized", "mlp", settings):
                torch.testing.assert_close(rank, alone, rtol=0, atol=1e-10)
        finally:
            pool.close()

    def test_self_check_sees_an_engine_that_differs(self, monkeypatch, caplog):
        """The plain way is the algorithm's own: an engine that gives φ̃ instead is found out."""

        def broken(self, function):
            return lambda phi, end, path, gradient: end

        monkeypatch.setattr("koi.inner.vectorized.VectorizedEngine.each", broken)
        learner = Koi(mlp_of_seed(6), algorithm=Halfway(), **SETTINGS)
        learner.train(Fits())
        assert learner.engine == "eager"
        assert "does not give" in caplog.text

    def test_branch_on_a_value_runs_one_by_one(self, caplog):
        @dataclass(frozen=True)
        class Branch(TowardsPoint):
            def gives(self, task):
                return task.end if task.end[0].sum() > 0 else task.start

        learner = Koi(mlp_of_seed(6), algorithm=Branch(), **SETTINGS)
        learner.train(Fits(kind=Fit))
        assert learner.engine == "eager"
        assert "running one task at a time" in caplog.text


class TestRefused:
    def test_class_that_is_no_frozen_dataclass(self):
        class Bare(Halfway):
            pass

        with pytest.raises(ConfigurationError, match=r"@dataclass\(frozen=True\) above .* Bare"):
            Koi(mlp(), algorithm=Bare())

    def test_second_order_of_nothing(self):
        @dataclass(frozen=True)
        class Second(Halfway):
            second_order: ClassVar[bool] = True

        with pytest.raises(ConfigurationError, match="so make query_gradient True"):
            Koi(mlp(), algorithm=Second())

    @pytest.mark.parametrize("given", [Reptile, "reptil", 3, None])
    def test_no_algorithm(self, given):
        with pytest.raises(ConfigurationError, match="'eigen-reptile', or an object such as"):
            Koi(mlp(), algorithm=given)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (lambda task: None, "returned None"),
            (lambda task: task.end[1:], "returned 3 of them"),
            (lambda task: [t.sum() for t in task.end], "shape \\(\\), float64 for a parameter of"),
            (lambda task: [t.float() for t in task.end], "float32 for a parameter of"),
            (lambda task: [1.0] * len(task.end), "returned float for a parameter of"),
        ],
    )
    def test_what_is_no_tensor_for_each_parameter(self, given, words):
        @dataclass(frozen=True)
        class Wrong(TowardsPoint):
            def gives(self, task):
                return given(task)

        model = mlp_of_seed(0)
        start = parameters_to_vector(model.parameters()).clone()
        with pytest.raises(ConfigurationError, match=words):
            Koi(model, algorithm=Wrong(), **SETTINGS).train(Fits())
        assert torch.equal(parameters_to_vector(model.parameters()), start)

    def test_second_order_through_any_optimizer(self):
        with pytest.raises(ConfigurationError, match=r"algorithm=Clipped\(\) differentiates"):
            Koi(mlp(), algorithm=Clipped(), inner_optimizer=torch.optim.RMSprop)

    def test_sparse(self):
        net = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
        with pytest.raises(ConfigurationError, match=r"algorithm=Clipped\(\) does not work"):
            Koi(net, algorithm=Clipped())


def test_the_door():
    assert koi.algorithms.NAMED["eigen-reptile"] == EigenReptile()
