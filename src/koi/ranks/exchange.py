"""The one flat buffer in which ranks tell each other all that a meta-iteration gave."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from koi import errors, memory
from koi.errors import ConfigurationError, KoiError, RankError
from koi.phi.arithmetic import Tensors, clone
from koi.phi.outcome import Outcome, Phi


class Form(NamedTuple):
    """What an outcome looks like beyond φ, which a rank without one cannot know.

    Args:
        moments: shape and type of each moment.
        row: how many losses each task has.
    """

    moments: tuple[tuple[torch.Size, torch.dtype], ...]
    row: int


class Told(NamedTuple):
    """What the ranks have told each other beside tensors."""

    rows: list[list[float]]
    weights: list[float]
    counts: list[int]
    failed: list[bool]
    digests: list[tuple[int, ...]]
    stop: bool
    end: bool
    constants: bool


class Buffer:
    """The one flat buffer: what tasks gave, buffers' changes, moments; losses, weights and flags.

    Each rank weighs its means by what its tasks count, and what it has to say for itself stands in
    places of its own, so that one sum over ranks brings all of it together. The type is the widest
    of φ's, at least float32.
    """

    def __init__(self, phi: Phi, form: Form, num_tasks: int, num_ranks: int) -> None:
        like = [*phi.learned, *phi.buffers]
        forms = [*((t.shape, t.dtype) for t in like), *form.moments]
        self._types = [kind for _, kind in forms]
        self._splits = len(like) - len(phi.buffers), len(like)
        self._num_tasks, self._row = num_tasks, form.row
        # where the figures of each kind begin: losses, weights, counts, failures, checksums, flags
        sizes = [num_tasks * form.row, num_tasks, num_ranks, num_ranks, 3 * num_ranks, 1, 1, 1]
        ends = itertools.accumulate(sizes)
        self._places = [0, *ends]
        self._figures: list[float] = []
        self._empty = True
        lengths = [shape.numel() for shape, _ in forms]
        self._size = sum(lengths)
        self._flat = torch.empty(
            self._size + self._places[-1],
            dtype=functools.reduce(torch.promote_types, (t.dtype for t in like), torch.float32),
            device=like[0].device,
        )
        parts = self._flat[: self._size].split(lengths)
        self._parts = [part.view(shape) for part, (shape, _) in zip(parts, forms, strict=True)]

    def clear(self) -> None:
        """Begin anew, with nothing in it."""
        self._empty = True
        self._figures = [0.0] * self._places[-1]

    @torch.no_grad()
    def put(self, outcome: Outcome, rank: int, first: int) -> None:
        """Put in the outcome of the tasks of ``rank``, of which ``first`` is the first."""
        count, weight = len(outcome.losses), outcome.weight
        if weight > 0:
            moments = outcome.moments if len(self._parts) > self._splits[1] else []
            for part, tensor in zip(
                self._parts, [*outcome.given, *outcome.buffers, *moments], strict=True
            ):
                torch.mul(tensor.to(part.dtype), weight / self._num_tasks, out=part)
            self._empty = False
        self._set(0, first * self._row, itertools.chain(*outcome.losses))
        self._set(1, first, [1] * count if outcome.weights is None else outcome.weights)
        self._set(2, rank, [count])

    def tell(
        self,
        rank: int,
        failed: bool,
        stop: bool,
        end: bool,
        digest: Sequence[int],
        constants: bool,
    ) -> None:
        """Put in what a rank has to say for itself."""
        self._set(3, rank, [failed])
        self._set(4, 3 * rank, digest)
        self._set(5, 0, [stop])
        self._set(6, 0, [end])
        self._set(7, 0, [constants])

    def reduce(self, group: dist.ProcessGroup | None = None) -> Told:
        """Sum over the ranks, or those of a group, and return the figures."""
        if self._empty:
            self._flat[: self._size].zero_()
        self._flat[self._size :] = torch.tensor(self._figures, dtype=self._flat.dtype)
        dist.all_reduce(self._flat, group=group)
        figures = self._flat[self._size :].tolist()
        losses, weights, counts, failed, digests, stop, end, constants = (
            figures[start:end] for start, end in itertools.pairwise(self._places)
        )
        return Told(
            [losses[i * self._row : (i + 1) * self._row] for i in range(self._num_tasks)],
            weights,
            [round(count) for count in counts],
            [flag > 0 for flag in failed],
            [tuple(map(int, digests[i : i + 3])) for i in range(0, len(digests), 3)],
            stop[0] > 0,
            end[0] > 0,
            constants[0] > 0,
        )

    def outcome(self, told: Told, constants: Tensors) -> Outcome:
        """Return the mean over the tasks of all ranks; with the ``constants`` of the last."""
        count = sum(told.counts)
        skipped = self._num_tasks - count
        shares = [
            share(rank, len(told.counts), self._num_tasks) for rank in range(len(told.counts))
        ]
        places = [
            number
            for (first, _), kept in zip(shares, told.counts, strict=True)
            for number in range(first, first + kept)
        ]
        losses, weights = [told.rows[i] for i in places], [told.weights[i] for i in places]
        total = sum(weights)
        if total == 0:
            return Outcome([], [], [], [], losses, skipped, weights=weights)
        if total != self._num_tasks:
            self._flat[: self._size].mul_(self._num_tasks / total)
        means = [part.to(kind) for part, kind in zip(self._parts, self._types, strict=True)]
        params, buffers = self._splits
        moments = clone(means[buffers:])  # they outlive the buffer
        moved = means[params:buffers]
        return Outcome(means[:params], moved, constants, moments, losses, skipped, weights=weights)

    def _set(self, kind: int, place: int, values: Iterable[float]) -> None:
        for number, value in enumerate(values, self._places[kind] + place):
            self._figures[number] = value


def share(rank: int, num_ranks: int, num_tasks: int) -> tuple[int, int]:
    """Return the first of a rank's tasks and the one after its last; sizes differ by one at most.

    >>> [share(rank, 4, 10) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return rank * num_tasks // num_ranks, (rank + 1) * num_tasks // num_ranks


def digest_of(phi: Phi) -> tuple[int, ...]:
    """Return 48 bits of a hash of φ, its buffers and moments, in numbers that float32 can hold."""
    parts = *phi.params, *phi.learned_rates, *phi.buffers, *(phi.moments or [])
    digest = memory.digest(*parts, size=6)
    return tuple(int.from_bytes(digest[i : i + 2], "big") for i in (0, 2, 4))


def error_of(rank: int, name: str, text: str) -> Exception:
    """Return what the other ranks raise: Koi's own error, if it was one."""
    kind = getattr(errors, name, None)
    where = "" if " (on rank " in text else f" (on rank {rank})"  # or it was heard of before
    if kind is ConfigurationError:
        return ConfigurationError([f"{text}{where}"])
    if isinstance(kind, type) and issubclass(kind, KoiError):
        return kind(f"{text}{where}")
    return RankError(f"rank {rank} has stopped, φ is as it was before: {name}: {text}")
