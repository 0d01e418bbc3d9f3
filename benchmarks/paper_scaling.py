"""What the measurements of `ranks.py` mean for more ranks and larger models, on paper.

A meta-iteration of k inner steps costs a rank k · t for its task and one all-reduce; a ring of W
ranks sends 2 (W − 1) / W times the buffer from each, in 2 (W − 1) messages. Hence the efficiency

    E = k t / (k t + 2 (W − 1) (α + B / (W β)))

with α the time of an empty message and β bytes per second of a link. With k = 1 this is ordinary
data parallelism; k inner steps between two exchanges are local SGD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import harness

RANKS = (8, 64, 1024)
STEPS = (1, 10, 50)


@dataclass(frozen=True)
class Link:
    """What connects ranks: seconds of an empty message, bytes per second."""

    latency: float
    bandwidth: float

    @classmethod
    def of(cls, messages: Mapping[int, float]) -> Link:
        """Read it off all-reduces between two ranks: 2 messages of half the bytes each."""
        smallest, largest = min(messages), max(messages)
        seconds = messages[largest] - messages[smallest]
        return cls(messages[smallest] / 2, (largest - smallest) / seconds)

    def seconds(self, num_bytes: float, ranks: int) -> float:
        """Return how long an all-reduce takes in a ring."""
        return 2 * (ranks - 1) * (self.latency + num_bytes / (ranks * self.bandwidth))

    def gathering(self, num_bytes: float, messages: float, ranks: int) -> float:
        """Return how long it takes to gather or scatter so many bytes in so many messages."""
        return (ranks - 1) * (messages * self.latency + num_bytes / (ranks * self.bandwidth))


@dataclass(frozen=True)
class Case:
    """A model and what computes an inner step of it.

    Args:
        name: for the table.
        parameters: float32, all of them sent.
        step: seconds of one inner step.
        link: what connects the ranks.
    """

    name: str
    parameters: float
    step: float
    link: Link

    def efficiency(self, ranks: int, steps: int) -> float:
        computing = steps * self.step
        return computing / (computing + self.link.seconds(4 * self.parameters, ranks))


# Assumed, not measured: 4·10^14 operations a second, 100 Gbit/s and 5 µs between any two GPUs;
# 6 operations for each parameter and token, 8,192 tokens in each inner step.
GPU_SPEED = 4e14
GPU_LINK = Link(5e-6, 12.5e9)
TOKENS = 8192


def cases(messages: Mapping[int, float], omniglot_step: float) -> list[Case]:
    """Return the three sizes: the first as measured here, the others on assumed GPUs."""
    return [
        Case("10^5, this CPU and link", 1e5, omniglot_step, Link.of(messages)),
        *(
            Case(f"10^{power}, GPUs", 10**power, 6 * 10**power * TOKENS / GPU_SPEED, GPU_LINK)
            for power in (8, 10)
        ),
    ]


def text(messages: Mapping[int, float], memory: Mapping[str, float], omniglot_step: float) -> str:
    """Return the computed table and the sentences that its numbers come from."""
    link = Link.of(messages)
    head = ["parameters", "inner steps", *(f"{ranks:,} ranks" for ranks in RANKS)]
    rows = [
        [case.name, str(steps), *(f"{100 * case.efficiency(n, steps):.0f} %" for n in RANKS)]
        for case in cases(messages, omniglot_step)
        for steps in STEPS
    ]
    largest = {name: 80e9 / size for name, size in memory.items()}
    return (
        f"{harness.markdown_table(head, rows)}\n\n"
        f"From measurements: an inner step of the Omniglot net (113,221 parameters, 10 images) "
        f"takes {1e3 * omniglot_step:.1f} ms on one thread; an empty message takes "
        f"{1e6 * link.latency:.0f} µs, and what is in it {link.bandwidth / 1e9:.2f} GB/s "
        f"(gloo over loopback). A rank needs "
        f"{memory['sgd']:.0f} bytes of memory for each parameter with SGD and {memory['adam']:.0f} "
        f"with the paper's Adam (β1 = 0), its moments carried, activations not "
        f"counted: on a GPU of 80 GB that is room for {largest['sgd'] / 1e9:.1f}·10^9 and "
        f"{largest['adam'] / 1e9:.1f}·10^9 parameters."
    )


@dataclass(frozen=True)
class Sharding:
    """What was measured of a sharded model on this machine.

    Args:
        parameters: float32.
        step: seconds of one inner step on one thread, of the whole model.
        layers: each sharded by itself.
        messages: within a task group in one inner step, of all layers.
        sent: bytes gathered and scattered in one inner step, for each parameter.
    """

    parameters: float
    step: float
    layers: int
    messages: float
    sent: float

    def efficiency(
        self, case: Case, shards: int, inside: Link, layers: int, ranks: int, k: int
    ) -> float:
        """Return the part of its time that a rank computes, nothing sent meanwhile."""
        computing = k * case.step
        messages = self.messages / self.layers * layers
        gathering = k * inside.gathering(self.sent * case.parameters, messages, shards)
        exchange = case.link.seconds(4 * case.parameters / shards, ranks // shards)
        return computing / (computing + gathering + exchange)


# Assumed, not measured: 48 layers, and 400 GB/s between the eight GPUs of a machine.
GPU_LAYERS = 48
GPU_INSIDE = Link(5e-6, 4e11)


def sharded_text(sharding: Sharding, here: Link) -> str:
    """Return the computed table of sharded models and the sentence that its numbers come from."""
    large = Case("10^10, GPUs", 1e10, 6e10 * TOKENS / GPU_SPEED, GPU_LINK)
    size = f"{sharding.parameters / 1e7:.1f}·10^7, this CPU and link"
    rows = []
    for case, shards, inside, layers, what in (
        (Case(size, sharding.parameters, sharding.step, here), 2, here, sharding.layers, "2"),
        (large, 8, GPU_INSIDE, GPU_LAYERS, "8 of one machine"),
        (large, 8, GPU_LINK, GPU_LAYERS, "8 of 8 machines"),
    ):
        for k in STEPS:
            parts = [sharding.efficiency(case, shards, inside, layers, ranks, k) for ranks in RANKS]
            rows.append([case.name, what, str(k), *(f"{100 * part:.0f} %" for part in parts)])
    head = ["parameters", "shards", "inner steps", *(f"{ranks:,} ranks" for ranks in RANKS)]
    return (
        f"{harness.markdown_table(head, rows)}\n\n"
        f"From measurements: for an inner step a rank gathers and scatters {sharding.sent:.1f} "
        f"bytes for each parameter in {sharding.messages / sharding.layers:.1f} messages for each "
        f"layer; a step of the whole model takes {1e3 * sharding.step:.0f} ms on one thread, an "
        f"empty message {1e6 * here.latency:.0f} µs, and what is in it "
        f"{here.bandwidth / 1e9:.2f} GB/s (gloo over loopback)."
    )
