"""One verdict on all ranks of a group, whatever happens on one of them: what `check_collective` stands on.

Ranks tell each other what they found through the store that torch.distributed was started with, never through the
group that the checked function uses. So a rank that leaves that function too early is not taken for one that sends a
message, and waits for the others until they have left it, too.
"""

import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from purelm.dist.world import Group, rank_of, size_of
from purelm.testing.laws import require

__all__ = ["Raised", "Ranks", "by_rank", "list_of_ranks"]

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for what another rank found: longer than any group's timeout (30 minutes by default)


class Raised(Exception):
    """What a checked function raised, with a sentence that says which function; no law's own AssertionError."""


class Ranks:
    """The members of a group, of which each makes one of these in the same place of the program."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = rank_of(group), size_of(group)
        self.out_of_step = ""  # why nothing more is done together
        self._count = 0
        if self.size > 1:
            members = dist.get_process_group_ranks(group)
            self._store = dist.PrefixStore(f"purelm.testing/{members}", dist.distributed_c10d._get_default_store())
            self._number = self._store.add(f"started by {self.rank}", 1)  # the same on all ranks

    def exchange(self, value: T) -> list[T]:
        """The value of each rank, in order of rank. An error of the store's where a rank is gone and says nothing."""
        if self.size == 1:
            return [value]
        self._count += 1
        self._store.set(self._key(self.rank), pickle.dumps(value))  # type: ignore[arg-type]  # bytes, too
        self._store.wait([self._key(rank) for rank in range(self.size)], PATIENCE)
        found = [pickle.loads(self._store.get(self._key(rank))) for rank in range(self.size)]
        if self._count > 1:  # whoever has written this value has read the one before
            self._store.delete_key(self._key(self.rank, self._count - 1))
        return found

    def _key(self, rank: int, count: int | None = None) -> str:
        return f"{self._number}/{self._count if count is None else count}/{rank}"

    def together(self, work: Callable[[], T]) -> T:
        """What work() returns; AssertionError on every rank if it raises on any, the same sentence on all.

        In work, messages come before comparisons: a comparison may fail on one rank, and no rank may then be in a
        function that waits for this one.
        """
        require(not self.out_of_step, f"not run: {self.out_of_step}")
        problem: Exception | None = None
        try:
            value = work()
        except Exception as error:  # anything that a user's function, or its backward, may raise
            problem = error
        wrong = isinstance(problem, AssertionError)
        said = wrong or isinstance(problem, Raised)
        text = "" if problem is None else str(problem) if said else f"raised {type(problem).__name__}: {problem}"
        found = self.exchange((text, wrong))
        raised = [rank for rank, (text, wrong) in enumerate(found) if text and not wrong]
        if raised and len({text for text, _ in found}) > 1:  # an error of all ranks leaves them in one place
            self.out_of_step = f"the ranks are out of step since an error on {list_of_ranks(raised)}"
        problems = {rank: text for rank, (text, _) in enumerate(found) if text}
        if problems:
            raise AssertionError(by_rank(problems)) from problem
        return value


def by_rank(texts: Mapping[int, str]) -> str:
    """Each text once, after the ranks that say it.

    >>> by_rank({0: "no", 1: "yes", 2: "no"})
    'on ranks 0, 2: no; on rank 1: yes'
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"on {list_of_ranks(found)}: {text}" for text, found in ranks.items())


def list_of_ranks(found: list[int]) -> str:
    """As in "ranks 0, 2"."""
    return f"rank{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
