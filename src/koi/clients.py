"""Tasks of data that only one rank sees."""

from __future__ import annotations

from typing import Any

from koi.errors import ConfigurationError, wrong


class ClientTasks:
    """The tasks of this rank alone, from data that no other rank sees: a hospital's, a speaker's.

    Each rank gives `koi.Koi.train` its own; task i of a meta-batch is drawn by the rank whose share
    it is in. φ moves by the mean over the tasks of all ranks, each inner loop being a client's
    local training: federated averaging (McMahan et al., arXiv 1602.05629, algorithm 1), with ε in
    the place of its 1. What ranks tell each other is that mean; the data stay where they are.

    Args:
        tasks: a distribution over the rank's own data, anything with ``sample() -> task``. It draws
            from the global generators alone, which Koi sets for each task.

    Raises:
        ConfigurationError: it has no ``sample``.

    >>> from koi.problems import Lines
    >>> ClientTasks(Lines()).sample().support_inputs.shape
    torch.Size([100, 1])
    """

    def __init__(self, tasks: Any) -> None:
        if not callable(getattr(tasks, "sample", None)):
            raise ConfigurationError(
                [wrong("tasks", tasks, "an object with a method sample() -> task")]
            )
        self.tasks = tasks

    def sample(self) -> Any:
        """Draw one task of this rank's."""
        return self.tasks.sample()
