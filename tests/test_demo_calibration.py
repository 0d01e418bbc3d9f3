"""How sure the page says it is: readings of scores, and which checkpoint they belong to."""

import math

import pytest
import torch

from koi import Koi
from koi.lab.demo.calibration import Reading, readings_of, signs, write
from koi.lab.demo.classifier import SHIPPED, Classifier
from koi.lab.demo.messages import MAX_STEPS
from koi.models import omniglot_net


def test_those_of_the_shipped_network_are_of_that_very_file():
    readings = readings_of(SHIPPED)
    assert readings is not None, "other weights: python benchmarks/calibrate.py DATA"
    assert {name: len(rows) for name, rows in readings.items()} == {
        "learned": MAX_STEPS + 1,
        "random": MAX_STEPS + 1,
    }


def test_a_file_and_what_is_written_beside_it(tmp_path):
    file, other = tmp_path / "koi.safetensors", tmp_path / "other.safetensors"
    Koi(omniglot_net(5)).save(file)
    assert readings_of(file) is None
    readings = {name: [Reading(1.5, 0.25, 0.5, -1.0)] * 3 for name in ("learned", "random")}
    write(file.with_suffix(".json"), file, readings)
    assert readings_of(file) == readings
    other.write_bytes(file.read_bytes() + b" ")
    other.with_suffix(".json").write_text(file.with_suffix(".json").read_text())
    assert readings_of(other) is None


def test_signs_by_hand():
    features = torch.tensor([[9.0, 0.0], [0.0, 2.0], [3.0, -4.0], [3.0, 4.0]])
    lead, distance = signs(torch.tensor([1.0, 4.0, 1.5]), features)
    assert lead == 2.5
    assert distance == pytest.approx(1 - 4 / 5)  # cosines 3/5, 4/5 and −7/25
    assert signs(torch.zeros(3), torch.zeros(4, 2)) == (0, 1)  # nothing in common with nothing


def test_a_reading_by_hand():
    reading = Reading(temperature=2.0, offset=0.5, lead=1.0, distance=-2.0)
    assert reading.known(lead=0.5, distance=0.5) == 0.5
    assert reading.known(lead=0.5 + math.log(3), distance=0.5) == pytest.approx(0.75)
    assert 0 < reading.known(lead=0.0, distance=1e6) < reading.known(lead=1e6, distance=0.0) < 1
    scores = torch.tensor([2 * math.log(3), 0.0])
    torch.testing.assert_close(reading.probabilities(scores), torch.tensor([0.75, 0.25]))


def test_an_answer_reads_each_step_by_its_own(tmp_path):
    torch.manual_seed(0)
    images = (torch.rand(3, 1, 28, 28) > 0.2).float()
    koi = Koi(omniglot_net(5), 1e-3, seed=0)
    plain = Classifier(koi).answer(images, images[1], 2, "learned")
    assert plain.known == []
    cold, hot = Reading(1e9, 0.0, 0.0, 0.0), Reading(1.0, math.log(3), 0.0, 0.0)
    readings = {"learned": [hot, cold, hot]}
    answer = Classifier(koi, readings).answer(images, images[1], 2, "learned")
    assert answer.losses == plain.losses
    assert answer.probabilities[0] == plain.probabilities[0]
    torch.testing.assert_close(answer.probabilities[1], [1 / 3] * 3)
    assert answer.known == [pytest.approx(p) for p in (0.75, 0.5, 0.75)]
    assert Classifier(koi, readings).answer(images, images[1], 2, "random").known == []


def test_a_drawing_that_is_an_example_is_nearer_than_another():
    """With the shipped network, of pictures as it was trained on: signs point the right way."""
    readings = readings_of(SHIPPED)
    for rows in readings.values():
        assert all(row.temperature > 0 for row in rows)
    assert all(row.distance < 0 for row in readings["learned"][1:])
