"""Quick start: learn to calibrate any sensor, then calibrate a new one from five readings."""

import torch
from torch import nn

from koi import Koi, linear


class Sensor:
    """A task. All that Koi asks of it is loss(model)."""

    def __init__(self, gain, offset, num_readings):
        self.truth = 2 * torch.rand(num_readings, 1) - 1
        self.reading = gain * torch.tanh(2 * self.truth) + offset

    def loss(self, model):
        return (model(self.reading) - self.truth).square().mean()


class Sensors:
    """A task distribution: each sensor has a gain and an offset of its own."""

    def sample(self):
        gain, offset = 0.5 + torch.rand(()), torch.rand(()) - 0.5
        sensor = Sensor(gain, offset, num_readings=5)
        sensor.query = Sensor(gain, offset, num_readings=100)  # what evaluate measures
        return sensor


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
koi = Koi(model, step_size=0.1, num_iterations=1000, meta_step_size=linear(0.5, 0), seed=0)
sensors = Sensors()

print("Random weights:", koi.evaluate(sensors), sep="\n")  # after 10 steps: 0.03 to 0.10
koi.train(sensors)  # model now has the weights that were found
print("Learned weights:", koi.evaluate(sensors), sep="\n")  # after 1 step: 0.02 to 0.04

sensor = sensors.sample()
adapted = koi.adapt(sensor)  # a new module; koi.model stays as it is
print(
    f"A new sensor: {sensor.query.loss(koi.model):.3f} → {sensor.query.loss(adapted):.3f}"
)  # falls
