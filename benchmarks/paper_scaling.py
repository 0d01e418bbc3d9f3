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
