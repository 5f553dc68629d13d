# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`Processes`: the processes that share one forward, and everything that they tell each other.

Two kinds of failure are kept apart. What one process refuses (`together`) all of them refuse, and the next forward may
follow. Where one is lost amid a forward, what the others wait for never comes: `LostProcessError`, and nothing follows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")

# Where rows lie among the patch tokens of an image: (start, end).
Range = tuple[int, int]


class OtherProcessError(ValueError):
    """Another process refused what all of them were to do."""


class LostProcessError(ConnectionError):
    """Another process has ended, or did not answer within the group's timeout: the processes cannot go on together."""


class Processes:
    """A process group, seen from one of its processes. Tensors travel as bytes, of any dtype.

    Args:
        group: of `torch.distributed`; `None` for all processes there are.

    Raises:
        RuntimeError: this process belongs to no group.
    """

    def __init__(self, group: Any = None) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                "There is no process group: start the program with `torchrun --nproc_per_node 2 ...`, and call "
                "torch.distributed.init_process_group() or make an accelerate.PartialState() first."
            )
        self._group = distributed.group.WORLD if group is None else group
        self.rank, self.number = distributed.get_rank(self._group), distributed.get_world_size(self._group)
        if self.rank < 0:
            raise RuntimeError("This process is not in the group: only those that are share its work.")
        self._is_in_step = True

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError where the group cannot move tensors between processes on this device."""
        if device.type == "cuda" and distributed.get_backend(self._group) == "gloo":
            raise ValueError(
                f"The model is on {device} and the process group's backend is 'gloo', which moves no rows between "
                "GPUs: call torch.distributed.init_process_group('nccl')."
            )

    def gather(self, states: torch.Tensor) -> list[torch.Tensor]:
        """What each process has, in their order; of one shape and dtype everywhere."""
        if self.number == 1:
            return [states]
        gathered = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(self.number)]
        with self._communicating():
            distributed.all_gather([_as_bytes(each) for each in gathered], _as_bytes(states.contiguous()), self._group)
        return gathered

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all processes, in their order.

        Args:
            rows: (rows, ...) of this one.
            counts: how many rows each has.
        """
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([of_one[:count] for of_one, count in zip(self.gather(padded), counts, strict=True)])

    def exchange(
        self,
        held: Sequence[Range],
        wanted: Sequence[Range],
        rows: Callable[[Range], torch.Tensor],
        places: Callable[[Range], torch.Tensor],
    ) -> None:
        """Each process gets those rows that it wants and others hold; no two hold the same.

        Args:
            held: which rows each process holds.
            wanted: which rows each process is to have in the end.
            rows: takes the range of rows that this one holds and another wants; returns them, (rows, features).
            places: takes the range of rows that come from another; returns where they go, contiguous.
        """
        sent, operations = [], []
        for other in range(self.number):
            if other == self.rank:
                continue
            if asked := common(held[self.rank], wanted[other]):
                sent.append(rows(asked).contiguous())  # kept until it has arrived
                operations.append(self._transfer(distributed.isend, sent[-1], other))
            if offered := common(held[other], wanted[self.rank]):
                operations.append(self._transfer(distributed.irecv, places(offered), other))
        if operations:
            with self._communicating():
                for work in distributed.batch_isend_irecv(operations):
                    work.wait()

    def send(self, states: torch.Tensor, receiver: int) -> None:
        """Hands a tensor to another process, which calls `receive`."""
        with self._communicating():
            distributed.send(_as_bytes(states.contiguous()), group=self._group, group_dst=receiver)

    def receive(self, states: torch.Tensor, sender: int) -> torch.Tensor:
        """Fills a contiguous tensor with what another process sends, and returns it."""
        with self._communicating():
            distributed.recv(_as_bytes(states), group=self._group, group_src=sender)
        return states

    def tell(self, message: Any) -> list[Any]:
        """The messages of all processes, in their order; anything that can be pickled."""
        self._check_step()
        messages = [None] * self.number
        with self._communicating():
            distributed.all_gather_object(messages, message, group=self._group)
        return messages

    def together(self, work: Callable[[], Result]) -> Result:
        """Does something that may fail, such as reading, and fails in all processes where it fails in one.

        Raises:
            OtherProcessError: another process failed; this one did not.
        """
        self._check_step()
        result, failure = None, None
        try:
            result = work()
        except LostProcessError:
            raise
        except Exception as error:  # told to the others, then raised
            failure = error
        failures = self.tell(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, reason in enumerate(failures):
            if reason is not None:
                raise OtherProcessError(f"Process {rank} of {self.number} stopped all of them: {reason}")
        return result

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around work in which the processes wait for each other: after an error in it they cannot go on together."""
        self._check_step()
        try:
            yield
        except BaseException:
            self._is_in_step = False
            raise

    @property
    def is_in_step(self) -> bool:
        """Whether the processes can go on together."""
        return self._is_in_step

    def _check_step(self) -> None:
        if not self._is_in_step:
            raise LostProcessError(
                "An earlier forward ended amid its layers, so the processes are not in step any more: end them all "
                "and start again."
            )

    def _transfer(self, direction: Callable, states: torch.Tensor, other: int) -> Any:
        return distributed.P2POp(direction, _as_bytes(states), group=self._group, group_peer=other)

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._is_in_step = False
            raise LostProcessError(
                f"Process {self.rank} of {self.number} heard nothing more from another one, which has ended or did "
                f"not answer within the group's timeout: look for the first error in the output of the others. "
                f"({error})"
            ) from error


def _as_bytes(states: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as its bytes, a view: not every backend knows every dtype."""
    return states.reshape(-1).view(torch.uint8)


def common(first: Range, second: Range) -> Range | None:
    """What two ranges have in common."""
    start, end = max(first[0], second[0]), min(first[1], second[1])
    return (start, end) if start < end else None
