"""Policies for carts and poles of many masses, each trained by a policy gradient of one's own.

Every task is gymnasium's CartPole-v1 with other masses, another length and another motor. A task
has `adapt(model, num_steps)`: so many updates by REINFORCE, each on a few episodes. Reptile learns
a policy from which few are enough. `python examples/cartpole.py` prints how many episodes it takes
to balance a new pole, from the learned start and from a random one.
"""

import os

import gymnasium
import numpy as np
import torch
from torch import nn

from koi import Koi

ITERATIONS, NUM_TASKS, MOST_UPDATES = 20, 10, 100
if os.environ.get("KOI_EXAMPLE_SHORT"):
    ITERATIONS, NUM_TASKS, MOST_UPDATES = 1, 1, 2
EPISODES = 8  # in an update
LENGTH, ENOUGH = 200, 150  # steps of the longest episode; a mean return that counts as balanced


class Pole:
    """A cart with a pole, and the policy gradient that learns to balance it."""

    def __init__(self, cart, pole, length, motor):
        self.environments = [gymnasium.make("CartPole-v1").unwrapped for _ in range(EPISODES)]
        for environment in self.environments:
            environment.masscart, environment.masspole = cart, pole
            environment.length, environment.force_mag = length, motor
            environment.total_mass = cart + pole
            environment.polemass_length = pole * length

    def adapt(self, model, num_steps):
        """REINFORCE (Williams, 1992) with Adam; a step is an update by EPISODES episodes."""
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(num_steps):
            self.update(model, optimizer)

    def update(self, model, optimizer):
        """Update a policy once, and return the mean return that it had."""
        log_probabilities, rewards = self.play(model)
        # what is still to come, undiscounted, and its mean over the episodes as a baseline
        to_come = rewards.flip(0).cumsum(0).flip(0)
        running = rewards > 0
        baseline = to_come.sum(1, keepdim=True) / running.sum(1, keepdim=True)
        advantage = (to_come - baseline) * running
        advantage = advantage / (advantage.std() + 1e-6)
        loss = -(log_probabilities * advantage).sum() / running.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return rewards.sum().item() / EPISODES

    def play(self, model):
        """Play episodes side by side: log-probabilities and rewards, shape (steps, episodes)."""
        seeds = torch.randint(2**31, (EPISODES,)).tolist()
        pairs = zip(self.environments, seeds, strict=True)
        states = [environment.reset(seed=seed)[0] for environment, seed in pairs]
        running = [True] * EPISODES
        log_probabilities, rewards = [], []
        while any(running) and len(rewards) < LENGTH:
            policy = torch.distributions.Categorical(logits=model(torch.tensor(np.stack(states))))
            actions = policy.sample()
            log_probabilities.append(policy.log_prob(actions))
            rewards.append([float(flag) for flag in running])
            for i, (environment, action) in enumerate(
                zip(self.environments, actions.tolist(), strict=True)
            ):
                if running[i]:
                    states[i], _, fallen, _, _ = environment.step(action)
                    running[i] = not fallen
        return torch.stack(log_probabilities), torch.tensor(rewards)


class Poles:
    """Masses, lengths and motors from half to twice those of CartPole-v1."""

    def sample(self):
        cart, pole, length, motor = (4 ** (torch.rand(4) - 0.5)).tolist()
        return Pole(1.0 * cart, 0.1 * pole, 0.5 * length, 10.0 * motor)


def policy():
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))


def episodes_needed(model, task):
    """Train on a new pole until the mean return is enough; return how many episodes that took."""
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for number in range(MOST_UPDATES):
            if task.update(model, optimizer) >= ENOUGH:
                return torch.tensor(number * EPISODES)
    return torch.tensor(MOST_UPDATES * EPISODES)


def main():
    torch.manual_seed(0)
    models = {"random policy": policy(), "learned start": policy()}
    koi = Koi(models["learned start"], num_steps=5, num_iterations=ITERATIONS, seed=0)
    koi.meta_batch_size = 4
    koi.train(Poles())
    print(f"episodes until the mean of {EPISODES} is {ENOUGH} of {LENGTH} steps, on new poles")
    print(f"{'':16}{'mean':>8}{'median':>8}{'most':>8}")
    for name, model in models.items():
        # no steps before the metric is called, which takes its own; the same poles for both
        needed = Koi(model, seed=1).measure(Poles(), episodes_needed, NUM_TASKS, num_steps=0)
        mean, median, most = needed.double().mean(), needed.median(), needed.max()
        print(f"{name:16}{mean:8.0f}{median:8d}{most:8d}")


if __name__ == "__main__":
    main()
