"""Several processes that learn one φ: each adapts to its share of every meta-batch.

Under torchrun, or wherever ``torch.distributed`` has a process group, the ranks of the default
group train together: one all-reduce of one flat buffer in each meta-iteration. Every rank then
makes the same meta-update, so that φ is the same everywhere without being sent.

The ranks meet in a fixed sequence of collectives: one buffer for each meta-iteration, one more at
the end. A rank that meets with an error goes to the next of these all the same and says so there;
none waits for it in vain, and all stop at the same φ.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from koi import memory
from koi.errors import ConfigurationError, RankError, annotate
from koi.phi.arithmetic import same_tensors
from koi.phi.outcome import Outcome, Phi
from koi.phi.shards import Shards
from koi.ranks.exchange import Buffer, Form, digest_of, error_of, share
from koi.ranks.grid import Grid
from koi.ranks.joining import join
from koi.ranks.presence import Presence

Result = TypeVar("Result")
log = logging.getLogger("koi")


class Holding(Protocol):
    """What can hold Ctrl-C back."""

    def held(self) -> AbstractContextManager[None]:
        """Let the block finish before an interrupt is handled."""


class Ranks:
    """The processes of a training; a single one where there is no process group.

    Args:
        device: where φ is.
        num_tasks: meta_batch_size.
        carry: whether moments live on from one meta-iteration to the next.
        interrupts: holds Ctrl-C back while ranks meet.
        settings: what must be the same on all, by name and in words.
        shards: the ranks that hold one φ together; None: each has it whole.

    Raises:
        ConfigurationError: there are more ranks than tasks, or settings differ between ranks.
        RankError: a rank does not come.
    """

    def __init__(
        self,
        device: torch.device,
        num_tasks: int,
        carry: bool,
        interrupts: Holding,
        settings: Mapping[str, str],
        shards: Shards | None = None,
    ) -> None:
        several = join(device)
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1
        self.shards = shards
        self.grid: Grid | None = None
        self._interrupts = interrupts
        self._phi: Phi | None = None
        self._buffer: Buffer | None = None
        self._check = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper() != "OFF"
        self._presence: Presence | None = None
        self._over = False  # no rank will come to another collective
        self._cut_off = False  # since one could not be reached
        self._stopping = self._ending = False
        self._error: BaseException | None = None
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self.wants_to_end = False
        if several:
            group = dist.group.WORLD
            assert group is not None
            self._presence = Presence(self.rank, self.size, group.get_group_store())
            self._presence.meet(settings)
            self.grid = None if shards is None else Grid(shards, device)
        self._set(num_tasks, carry)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which shows, logs and saves."""
        return self.rank == 0

    @property
    def stopping(self) -> bool:
        """Whether training is to stop here; on several ranks, as all of them have agreed."""
        return self._stopping if self.size > 1 else self.wants_to_stop()

    @property
    def ending(self) -> bool:
        """Whether training is to end as if all was done.

        Several ranks do so one meta-iteration after one of them wanted it, when all know.
        """
        return self._ending if self.size > 1 else self.wants_to_end

    @property
    def all_have_stopped(self) -> bool:
        """Whether all ranks have heard of an error, and are at the same φ."""
        return self.size == 1 or (self._over and not self._cut_off)

    def training(self, phi: Phi) -> Ranks:
        """Return this, to be used in ``with`` around the meta-iterations."""
        self._phi = phi
        return self

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Meet a last time: until rank 0 has saved, and to tell of an error."""
        if self.size == 1 or self._over:
            return
        self._error = error
        with self._interrupts.held():
            if error is None:
                self._meet(None)
                self._over = True
            else:  # which goes on its way whatever comes of this
                with suppress(BaseException):
                    self._meet(None)

    def _set(self, num_tasks: int, carry: bool) -> None:
        place, size, what = self.rank, self.size, "rank"
        if self.grid is not None:
            place, size, what = self.grid.number, self.grid.size, "task group"
        if num_tasks < size:
            raise ConfigurationError(
                [
                    f"meta_batch_size = {num_tasks} on {size} {what}s: every {what} needs a task "
                    f"of each meta-batch, so take at least {size}, or fewer {what}s"
                ]
            )
        self._place, self._parts = place, size
        self.share = share(place, size, num_tasks)
        self._num_tasks = num_tasks
        self._carry = carry

    def adjust(self, phi: Phi, num_tasks: int, carry: bool) -> None:
        """Take in what may have changed between two meta-iterations, the same on all ranks."""
        before = self._phi
        if (num_tasks, carry) != (self._num_tasks, self._carry):
            self._set(num_tasks, carry)
            self._buffer = None
        elif before is not None and not same_tensors(before.learned, phi.learned):
            self._buffer = None
        self._phi = phi

    def attempt(self, adapt: Callable[[int, int], Outcome]) -> Outcome | None:
        """Return what ``adapt`` gives for this rank's tasks, from the first to before the last.

        On several ranks an error is kept until `mean`, where all hear of it; but one that has met
        a rank of a task group alone is raised here, as the others do not come to it.
        """
        if self.size == 1:
            return adapt(0, self._num_tasks)
        outcome = None
        try:
            if self.grid is None:
                return adapt(*self.share)
            with self._interrupts.held():  # a rank that stopped alone would be waited for
                outcome = adapt(*self.share)
        except BaseException as error:
            self._error, outcome = error, None
        if self._presence is not None and self.shards is not None:
            self._look_at_group(self._presence, self.shards.ranks)
        return outcome

    def mean(self, outcome: Outcome | None) -> Outcome:
        """Return the outcome of the whole meta-batch, the same on every rank.

        Raises:
            RankError: another rank has stopped or does not answer. Where its error is one of
                Koi's, it is raised here too.
        """
        if self.size > 1:
            return self._meet(outcome)
        assert outcome is not None
        return outcome

    @contextmanager
    def agreed(self, ends: bool = True) -> Iterator[None]:
        """Raise an error of the block on all ranks; ``ends``: and training ends with it."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            self._error = error
        self._hear(ends)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Raise an error of the block, or Ctrl-C, on all ranks, where φ is sharded.

        A rank that went on alone would wait for the others' shards.
        """
        presence, shards = self._presence, self.shards
        if presence is None or shards is None:
            yield
            return
        try:
            with self._interrupts.held():
                yield
        except BaseException as error:
            if self._over:
                raise
            self._error = error
        with self._interrupts.held():
            self._look_at_group(presence, shards.ranks)
            grid, failing = self.grid, self._error is not None
            assert grid is not None
            while shards.all_evaluate(False, grid.device) is None:
                pass  # whoever evaluates alone is told so, and comes here
            if self._together(lambda: grid.any(failing))[0]:
                self._hear()

    def from_first(self, content: bytes) -> bytes:
        """Return what rank 0 gave here, sent in pieces, so that only pieces are copied."""
        size, parts = self._from_first(len(content)), []
        for start in range(0, size, memory.PIECE):
            parts.append(self._from_first(content[start : start + memory.PIECE]))
        return content if self.first else b"".join(parts)

    def values(self, value: Result) -> list[Result]:
        """Return what each rank gave here; all must come to it."""
        return self._all(value) if self.size > 1 else [value]

    def value_of_first(self, value: Result) -> Result:
        """Return what rank 0 gave here; all must come to it."""
        return self._from_first(value) if self.size > 1 else value

    def _from_first(self, value: Result) -> Result:
        box = [value]
        self._together(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def _meet(self, outcome: Outcome | None) -> Outcome:
        """Reduce one buffer that holds all that the ranks have to tell each other."""
        assert self._phi is not None
        buffer = self._buffer or self._make_buffer(self._phi, outcome)
        buffer.clear()
        if outcome is not None:
            try:
                buffer.put(outcome, self._place, self.share[0])
            except Exception as error:
                self._error = error
        digest = digest_of(self._phi) if self._check else (0, 0, 0)
        before = self._phi.constants
        own = outcome.constants if outcome is not None and outcome.losses else None
        changed = own is not None and not all(map(torch.equal, own, before))
        wishes = self.wants_to_stop(), self.wants_to_end
        failing = self._error is not None
        buffer.tell(self._place, failing, *wishes, digest, changed)
        told = self._together(lambda: buffer.reduce(self._column))
        if self.grid is not None:
            grid, said = self.grid, (failing, *wishes, told.constants)
            flags = self._together(lambda: grid.any(*said))
            told = told._replace(failed=flags[:1], stop=flags[1], end=flags[2], constants=flags[3])
        if any(told.failed):
            self._hear()
        if len(set(told.digests)) > 1:
            self._over = True
            raise RankError(
                "the ranks are not in step: φ or its moments differ between them (checksums "
                f"{', '.join(map(str, told.digests))}): does a callback change them on one rank?"
            )
        self._stopping, self._ending = told.stop, told.end
        constants = before
        if told.constants:  # integers, which the buffer's type may not hold: rarely, and few
            constants = [each for each in self._all(own) if each is not None][-1]
        return buffer.outcome(told, constants)

    def _make_buffer(self, phi: Phi, outcome: Outcome | None) -> Buffer:
        """Return a buffer of the form of outcomes, which a rank without one learns from others."""
        mine = None
        if outcome is not None and outcome.losses:
            moments = outcome.moments if self._carry else []
            mine = Form(tuple((m.shape, m.dtype) for m in moments), len(outcome.losses[0]))
        forms = {form for form in self._all(mine, self._column) if form is not None}
        if len(forms) > 1:
            self._over = True
            raise RankError(
                "the optimizer's moments or the losses differ in number or shape between ranks: "
                "let inner_optimizer and tasks be alike on all of them"
            )
        buffer = Buffer(phi, next(iter(forms), Form((), 0)), self._num_tasks, self._parts)
        if forms:
            self._buffer = buffer
        return buffer

    def _hear(self, ends: bool = True) -> None:
        """Raise the error of this rank or, with the same meaning, that of another one."""
        own, self._error = self._error, None
        told = self._all(None if own is None else (type(own).__name__, str(own)))
        failed = [(rank, *text) for rank, text in enumerate(told) if text is not None]
        if not failed:
            return
        self._over = ends
        if own is not None:
            annotate(own, f"on rank {self.rank}")
            raise own
        raise error_of(*failed[0])

    def _look_at_group(self, presence: Presence, ranks: tuple[int, ...]) -> None:
        """Leave, with an error that the other ranks of the task group have not met with.

        They wait in the model's own messages, and hear why when these fail: as the process of this
        rank ends, at the latest after torch's timeout.
        """
        presence.is_done()
        error = self._error
        away, left = presence.company(ranks) if error is not None else ([], {})
        if error is None or not (away or left):
            return  # all come to `mean`, and hear of it there
        self._error, self._over, self._cut_off = None, True, True
        for rank, why in left.items():
            raise error_of(rank, *why) from error
        presence.is_done(type(error).__name__, str(error))
        others = ", ".join(map(str, away))
        annotate(error, f"on rank {self.rank}; rank {others} hears of it when this process ends")
        raise error

    @property
    def _column(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same rows of φ; None: all."""
        return None if self.grid is None else self.grid.column

    def _all(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        gathered = [None] * (self.size if group is None else self._parts)
        self._together(lambda: dist.all_gather_object(gathered, value, group))
        return gathered

    def _together(self, work: Callable[[], Result]) -> Result:
        """Run a collective.

        Raises:
            RankError: it failed, naming the ranks that did not come to it.
        """
        presence = self._presence
        assert presence is not None
        presence.at_collective()
        try:
            return work()
        except RuntimeError as error:
            self._over = self._cut_off = True
            problem = (
                f"rank {self.rank} cannot reach the others ({str(error).strip()}): "
                f"{presence.missing()}; φ is as it was before"
            )
            log.error(problem)  # at once: whoever started the ranks may end them soon
            raise RankError(problem) from error
