"""Optimizers that step as themselves: what they keep is carried on whole, or refused by name."""

from functools import partial

import pytest
import torch

from koi import ConfigurationError
from koi.inner.optimizers.bound import bound_optimizer
from koi.inner.optimizers.torch_optimizer import TorchOptimizer
from optimizer_toys import Prodigal, Toy, gradients, inner_of, leaves, noisy, start_params

pytestmark = pytest.mark.usefixtures("float64")


def bind(factory, params, num_tasks=None):
    return TorchOptimizer(inner_of(factory, params), params, num_tasks)


def after(bound, moments, start, grads):
    """Return the parameters after steps from ``start``, and the moments."""
    for param, value in zip(bound.params, start, strict=True):
        param.data.copy_(value)
    bound.load(moments)
    for row in grads:
        bound.step(row)
    return [p.detach().clone() for p in bound.params], bound.moments()


def by_hand(factory, start, grads, **entries):
    """Return the parameters after steps of a new optimizer, with these entries in its group."""
    params = leaves(start)
    optimizer = factory(params, 0.1)
    optimizer.param_groups[0].update(entries)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        optimizer.step()
    return [p.detach() for p in params], optimizer.param_groups[0]


class TestStateInGroups:
    def test_does_not_reach_the_next_task(self):
        start, first, second = start_params(), gradients(3), gradients(3)
        bound = bind(Prodigal, leaves(start))
        after(bound, None, start, first)
        params, _ = after(bound, None, start, second)
        torch.testing.assert_close(params, by_hand(Prodigal, start, second)[0])

    def test_is_carried_on(self):
        start, grads = start_params(), gradients(6)
        bound = bind(Prodigal, leaves(start))
        half, moments = after(bound, None, start, grads[:3])
        after(bound, None, start, grads[2:3])
        whole, _ = after(bound, moments, half, grads[3:])
        torch.testing.assert_close(whole, by_hand(Prodigal, start, grads)[0])

    def test_is_the_mean_over_tasks(self):
        """Whole numbers that are equal stay whole."""
        start, grads = start_params(), gradients(6)
        bound = bind(Prodigal, leaves(start))
        runs = [after(bound, None, start, half)[1] for half in (grads[:3], grads[3:])]
        means = [(one + other) / 2 for one, other in zip(*runs, strict=True)]
        groups = [by_hand(Prodigal, start, half)[1] for half in (grads[:3], grads[3:])]
        d = (groups[0]["d"] + groups[1]["d"]) / 2
        more = gradients(2)
        params, _ = after(bound, means, start, more)
        group = bound._optimizer.param_groups[0]
        torch.testing.assert_close(params, by_hand(Prodigal, start, more, d=d, k=3)[0])
        assert group["k"] == 5
        assert type(group["k"]) is int

    def test_that_is_a_tensor(self):
        def grow(group, state, grad):
            group["total"] += grad.abs().sum()

        factory = partial(Toy, after=grow)
        start, grads = start_params(), gradients(4)

        def with_tensor(params, lr):
            return factory(params, lr, total=torch.zeros(()))

        bound = bind(with_tensor, leaves(start))
        _, moments = after(bound, None, start, grads[:2])
        kept = [m.clone() for m in moments]
        _, more = after(bound, moments, start, grads[2:])
        total = sum(grad.abs().sum() for row in grads for grad in row)
        torch.testing.assert_close(bound._optimizer.param_groups[0]["total"], total)
        torch.testing.assert_close(more[0], total)
        assert all(torch.equal(m, k) for m, k in zip(moments, kept, strict=True))

    def test_that_begins_to_change_late(self):
        """As weights of an average that wait for a warm-up."""

        def late(group, state, grad):
            state["step"] = state.get("step", 0) + 1
            if state["step"] == 4:
                group["scale"] = group["scale"] / 3

        factory = partial(Toy, after=late, scale=1.0)
        bound = bind(factory, leaves(start_params()))
        _, moments = after(bound, None, start_params(), gradients(3))
        bound.load(moments)
        assert bound._optimizer.param_groups[0]["scale"] == 1.0
        _, moments = after(bound, None, start_params(), gradients(4))
        bound.load(None)
        assert bound._optimizer.param_groups[0]["scale"] == 1.0
        bound.load(moments)
        assert bound._optimizer.param_groups[0]["scale"] == 1 / 27

    def test_settings_that_do_not_change_are_the_factorys(self):
        """So that another setting takes effect, though moments of before are carried on."""
        params = leaves(start_params())
        settings = {"eps": 1e-3, "lr": 0.1, "alpha": 0.9}
        one, other = (
            bind(lambda ps, lr, eps=eps: torch.optim.RMSprop(ps, **settings | {"eps": eps}), params)
            for eps in (1e-3, 0.5)
        )
        _, moments = after(one, None, start_params(), gradients(2))
        other.load(moments)
        assert other._optimizer.param_groups[0]["eps"] == 0.5

    def test_rates_that_a_scheduler_sets_begin_anew(self):
        def decay(group, state, grad):
            group["lr"] /= 2
            group["betas"] = (0.5, group["betas"][1] / 2)

        bound = bind(partial(Toy, after=decay, betas=(0.9, 0.9)), leaves(start_params()))
        _, moments = after(bound, None, start_params(), gradients(2))
        bound.load(moments)
        group = bound._optimizer.param_groups[0]
        assert (group["lr"], group["betas"]) == (0.1, (0.9, 0.9))

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda group, state, grad: group.update(mode="later"), "mode"),
            (lambda group, state, grad: group["seen"].append(1), "seen"),
            (lambda group, state, grad: group.update(more=(len(group),)), "more"),
        ],
    )
    def test_of_another_kind_is_refused(self, change, named):
        def factory(params, lr):
            return Toy(params, lr, change, mode="first", seen=[])

        bound = bind(factory, leaves(start_params()))
        bound.load(None)
        bound.step(gradients(1)[0])
        with pytest.raises(ConfigurationError, match=rf"gave Toy, which keeps .*\('{named}'\)"):
            bound.moments()


class TestStateOfParameters:
    @pytest.mark.parametrize(
        ("keep", "named"),
        [
            (lambda state: {"past": [1.0]}, "past"),
            (lambda state: {"codes": torch.zeros(3, dtype=torch.uint8)}, "codes"),
        ],
    )
    def test_that_has_no_mean_is_refused(self, keep, named):
        factory = partial(Toy, after=lambda group, state, grad: state.update(keep(state)))
        with pytest.raises(ConfigurationError, match=rf"gave Toy, which keeps .*\('{named}'\)"):
            bind(factory, leaves(start_params()))

    @pytest.mark.parametrize("when", ["first", "fourth"])
    def test_that_comes_late_or_grows_is_refused(self, when):
        def history(group, state, grad):
            state["step"] = state.get("step", 0) + 1
            if when == "first" or state["step"] > 3:
                state["past"] = torch.zeros(state["step"])

        bound = bind(partial(Toy, after=history), leaves(start_params()))
        bound.load(None)
        for row in gradients(4):
            bound.step(row)
        with pytest.raises(ConfigurationError, match=r"comes, grows .*\('past'\)"):
            bound.moments()

    def test_of_no_parameter_is_carried_on(self):
        """As in MADGRAD, whose state has a count under a name."""

        class Slower(torch.optim.SGD):
            def step(self, closure=None):
                self.state["k"] = self.state.get("k", torch.zeros(())) + 1
                self.param_groups[0]["lr"] = 0.1 / self.state["k"].item()
                super().step(closure)

        start, grads = start_params(), gradients(5)
        bound = bind(Slower, leaves(start))
        half, moments = after(bound, None, start, grads[:3])
        whole, _ = after(bound, moments, half, grads[3:])
        torch.testing.assert_close(whole, by_hand(Slower, start, grads)[0])

    @pytest.mark.parametrize(("key", "named"), [("all", "all"), (3, "a int")])
    def test_of_no_parameter_and_no_number_is_refused(self, key, named):
        class Counting(Toy):
            def step(self, closure=None):
                self.state[key] = {"steps": 1}
                super().step(closure)

        with pytest.raises(ConfigurationError, match=rf"a dict of no parameter \('{named}'\)"):
            bind(Counting, leaves(start_params()))

    def test_a_number_loses_no_digit(self):
        factory = partial(Toy, after=lambda group, state, grad: state.update(rate=1e-6 + 1e-17))
        bound = bind(factory, leaves(start_params()))
        _, moments = after(bound, None, start_params(), gradients(1))
        bound.load(moments)
        assert bound._optimizer.state[bound.params[0]] == {"rate": 1e-6 + 1e-17}

    def test_what_hangs_on_the_optimizer_begins_anew(self):
        def counting(params, lr):
            optimizer = torch.optim.SGD(params, lr)
            optimizer.num_steps = 0

            def count(*_):
                optimizer.num_steps += 1

            optimizer.register_step_post_hook(count)
            return optimizer

        bound = bind(counting, leaves(start_params()))
        for num_steps in (3, 2):
            after(bound, None, start_params(), gradients(num_steps))
            assert bound._optimizer.num_steps == num_steps


@pytest.mark.parametrize("factory", [torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("num_tasks", [None, 2])
def test_moments_that_do_not_fit(factory, num_tasks):
    def of_rows(values):
        rows = values if num_tasks is None else [v.expand(num_tasks, *v.shape) for v in values]
        params = leaves(rows)
        return bound_optimizer(inner_of(factory, params), params, num_tasks)

    bound = of_rows(start_params())
    apart = bind(factory, leaves(start_params()))
    moments = bound_optimizer(inner_of(factory, apart.params), apart.params)
    moments.load(None)
    moments.step(gradients(1)[0])
    own = moments.moments()
    bound.load(own)
    for wrong in (own[:-1], own[1:], [*own, own[-1]], [], [own[1], own[0], *own[2:]]):
        with pytest.raises(ConfigurationError, match="do not fit inner_optimizer"):
            bound.load(wrong)


def test_noise_draws_nothing_when_it_is_tried():
    params = leaves(start_params())
    before = torch.get_rng_state()
    bind(noisy, params)
    assert torch.equal(torch.get_rng_state(), before)
