"""Callbacks that remember something go on from a checkpoint as they were."""

import pytest
import torch

from koi import CheckpointError, ConfigurationError, Koi, KoiWarning
from toys import Regressions, assert_same, small_net, snapshot

SETTINGS = {
    "step_size": 0.1,
    "num_steps": 2,
    "num_iterations": 8,
    "meta_step_size": 0.1,
    "seed": 0,
}


class Stop(Exception):  # noqa: N818
    pass


class Setup:
    """A learner whose meta-optimizer has a schedule, stepped by a callback, as torch's are."""

    def __init__(self, stops=None):
        self.model = small_net()
        for param in self.model.parameters():
            param.data.fill_(0.3)
        self.koi = Koi(
            self.model, **SETTINGS, algorithm="fomaml", meta_optimizer=self.make, vectorize=False
        )
        self.stops = stops

    def make(self, params):
        self.optimizer = torch.optim.Adam(params, lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        return self.optimizer

    def step(self, koi, record):
        self.scheduler.step()
        if koi.iteration == self.stops:
            raise Stop

    __call__ = step

    def state_dict(self):
        return self.scheduler.state_dict()

    def load_state_dict(self, state):
        self.scheduler.load_state_dict(state)


class Count:
    """Counts how often it was called; its state is an alias, as torch's are."""

    def __init__(self, start=0):
        self.state = {"count": start, "sum": torch.tensor(0.0)}

    def __call__(self, koi, record):
        self.state["count"] += 1
        self.state["sum"] += record.loss_before

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def learner(num_iterations=8):
    return Koi(small_net(), **{**SETTINGS, "num_iterations": num_iterations})


@pytest.mark.parametrize("form", ["object", "method"])
def test_scheduler_goes_on(form, tmp_path):
    def callbacks(setup):
        return [setup if form == "object" else setup.step]

    whole, cut, resumed = Setup(), Setup(stops=5), Setup()
    whole.koi.train(Regressions(), callbacks=callbacks(whole))
    with pytest.raises(Stop):
        cut.koi.train(Regressions(), callbacks=callbacks(cut), checkpoint_dir=tmp_path)
    resumed.koi.train(
        Regressions(), callbacks=callbacks(resumed), checkpoint_dir=tmp_path, resume=True
    )
    assert_same(resumed.model, whole.model)
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()


def test_scheduler_that_no_callback_keeps(tmp_path):
    setup = Setup()
    with pytest.warns(KoiWarning, match="meta_optimizer has a scheduler, and no checkpoint will"):
        setup.koi.train(
            Regressions(), callbacks=[lambda *_: setup.scheduler.step()], checkpoint_dir=tmp_path
        )
    other = Setup()
    other.koi.train(Regressions(), callbacks=[lambda *_: other.scheduler.step()])


def test_each_takes_its_own(tmp_path):
    """In order, those without a state left out, whatever they are."""
    counts = Count(), Count(100)
    learner(3).train(Regressions(), callbacks=[*counts, print], checkpoint_dir=tmp_path)
    resumed = Count(), Count()
    seen = []
    with pytest.raises(CheckpointError, match="does not fit"):
        Koi(small_net(), 0.2).train(
            Regressions(), callbacks=resumed, checkpoint_dir=tmp_path, resume=True
        )
    assert [count.state["count"] for count in resumed] == [0, 0]
    koi = Koi(small_net(), **{**SETTINGS, "num_iterations": 5})
    koi.train(
        Regressions(),
        callbacks=[resumed[0], lambda *_: seen.append(None), resumed[1].__call__],
        checkpoint_dir=tmp_path,
        resume=True,
    )
    assert [count.state["count"] for count in resumed] == [5, 105]
    total = sum(torch.tensor(record.loss_before) for record in koi.history)
    assert [count.state["sum"] for count in resumed] == [total, total]
    assert len(seen) == 2


@pytest.mark.parametrize(("there", "here"), [(1, 0), (0, 1), (2, 1)])
def test_other_callbacks_are_refused(there, here, tmp_path):
    counts = [Count() for _ in range(there)]
    learner(3).train(Regressions(), callbacks=counts, checkpoint_dir=tmp_path)
    model = small_net()
    before = snapshot(model)
    koi = Koi(model, **{**SETTINGS, "num_iterations": 5})
    match = rf"the states of {there} callbacks, and of the callbacks given {here} have state_dict"
    with pytest.raises(CheckpointError, match=match):
        koi.train(
            Regressions(),
            callbacks=[Count() for _ in range(here)],
            checkpoint_dir=tmp_path,
            resume=True,
        )
    assert koi.iteration == 0
    assert_same(model, before)


@pytest.mark.parametrize("form", ["object", "method"])
def test_state_that_cannot_be_given_back(form):
    class Forgetful:
        def __call__(self, koi, record): ...

        def state_dict(self): ...

    callback = Forgetful() if form == "object" else Forgetful().__call__
    koi = learner()
    with pytest.raises(ConfigurationError, match=r"Forgetful has state_dict and no load_state_dic"):
        koi.train(Regressions(), callbacks=[callback])
    assert koi.iteration == 0


def test_state_that_a_file_cannot_hold(tmp_path):
    """Known before the first meta-iteration."""
    count = Count()
    count.state["file"] = object()
    koi = learner()
    with pytest.raises(CheckpointError, match=r"cannot hold callbacks\[0\]\.file, of type object"):
        koi.train(Regressions(), callbacks=[count], checkpoint_dir=tmp_path)
    assert koi.iteration == 0


def test_saved_and_loaded_by_hand(tmp_path):
    koi = learner(3)
    koi.train(Regressions(), callbacks=[Count()])
    koi.save(tmp_path / "koi")
    Koi.load(tmp_path / "koi", small_net()).save(tmp_path / "again")  # nothing is lost on the way
    koi = Koi.load(tmp_path / "again", small_net(), num_iterations=5)
    with pytest.raises(CheckpointError, match="the states of 1 callbacks"):
        koi.train(Regressions())
    count = Count()
    koi.train(Regressions(), callbacks=[count])
    assert count.state["count"] == 5
    koi.num_iterations = 7
    koi.train(Regressions(), callbacks=[count])  # and given only once
    assert count.state["count"] == 7


def test_class_as_a_callback_has_no_state(tmp_path):
    class Seen(Count):
        @classmethod
        def look(cls, koi, record): ...

    learner(2).train(Regressions(), callbacks=[Seen.look], checkpoint_dir=tmp_path)


def test_checkpoint_of_before_is_read(tmp_path):
    """It says nothing of callbacks."""
    from koi import storage

    learner(3).train(Regressions(), checkpoint_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    data = storage.read(path)
    del data["callbacks"]
    storage.write(path, data)
    count = Count()
    learner(5).train(Regressions(), callbacks=[count], checkpoint_dir=tmp_path, resume=True)
    assert count.state["count"] == 2
