"""Comparison of many pairs, with sympy in worker processes."""

import queue
from collections.abc import Callable, Iterable
from types import TracebackType

from purelm.align.graders.compare import NEEDS_PROOF
from purelm.align.graders.equality import equal
from purelm.align.graders.policy import NO_POLICY, Policy, Verdict
from purelm.align.graders.worker import Worker
from purelm.workers import check_workers, in_threads

__all__ = ["Grader", "grade_all"]


class Grader:
    """`graders.equal` with sympy for what exact arithmetic leaves open.

    sympy runs in processes, each of which is ended and started anew when a pair takes more than `seconds` (whole) of
    CPU time; that pair is "undecided: time", which is not equal. CPU time, so that a busy machine changes no verdict.
    May be used from any thread, and by several at once: up to n_workers pairs are with sympy at a time.

        with Grader() as grader:
            grader.equal("\\sin^2 x + \\cos^2 x", "1")      # Verdict(equal=True, reason='sympy')
            r1_zero(response, gold, grade=grader.equal)

    Errors: ModuleNotFoundError where sympy is needed and missing.
    """

    def __init__(self, n_workers: int = 1, *, policy: Policy = NO_POLICY, seconds: int = 5) -> None:
        if not isinstance(seconds, int) or isinstance(seconds, bool) or not 1 <= seconds <= 3600:
            raise ValueError(f"seconds is {seconds!r}: allowed are whole numbers from 1 to 3600")
        self.n_workers = check_workers(n_workers)
        self.policy = policy
        self.workers = [Worker(seconds) for _ in range(self.n_workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. A Grader that is used again starts new ones."""
        for worker in self.workers:
            worker.stop()

    def equal(self, answer: str, gold: str) -> Verdict:
        """The verdict on one pair; sympy is asked only where it is needed."""
        found = equal(answer, gold, self.policy)
        return self._in_worker((answer, gold)) if found.reason == NEEDS_PROOF else found

    def equal_all(
        self, pairs: Iterable[tuple[str, str]], progress: Callable[[int, int], None] | None = None
    ) -> list[Verdict]:
        """The verdicts in order; progress(done, total) after each. With several workers, all pairs are theirs."""
        pairs = list(pairs)
        one = self.n_workers == 1
        work = (lambda pair: self.equal(*pair)) if one else self._in_worker
        verdicts = []
        for _, verdict in in_threads(work, pairs, self.n_workers):
            verdicts.append(verdict)
            if progress is not None:
                progress(len(verdicts), len(pairs))
        return verdicts

    def _in_worker(self, pair: tuple[str, str]) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.equal(*pair, self.policy)
        finally:
            self._idle.put(worker)


def grade_all(
    pairs: Iterable[tuple[str, str]],
    n_workers: int | None = 1,
    *,
    policy: Policy = NO_POLICY,
    seconds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """`equal` of each (answer, gold) with sympy, in order, by n_workers processes (None: one for each processor).

    The verdicts are the same for any number of workers.

    >>> [verdict.equal for verdict in grade_all([("0.5", "1/2"), ("0.5", "1/3")])]
    [True, False]
    """
    with Grader(check_workers(n_workers), policy=policy, seconds=seconds) as grader:
        return grader.equal_all(pairs, progress)
