"""Trainings that write logs and stop, and what is in their logs."""

import json
import time

from koi import Koi
from toys import small_net

SETTINGS = {"step_size": 0.1, "num_steps": 2, "num_iterations": 6, "meta_step_size": 0.5, "seed": 0}


class Stop(Exception):  # noqa: N818
    pass


def stops_after(iteration):
    def callback(koi, record):
        if record.iteration + 1 == iteration:
            raise Stop

    return callback


def learner(**settings):
    model = small_net()
    for param in model.parameters():
        param.data.fill_(0.3)
    return Koi(model, **SETTINGS | settings)


def lines(folder, name="metrics.jsonl"):
    """Return the lines, strictly read: each whole, without NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    text = (folder / name).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def curve(folder, name="loss_before"):
    """Return TensorBoard's curve as it shows it: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def next_second():
    """Wait for it: TensorBoard reads files by name, and a name begins with its second.

    Of one second and one process the tenth file comes before the ninth. No training is killed and
    started again, in a process of its own, within one.
    """
    time.sleep(1 - time.time() % 1)
