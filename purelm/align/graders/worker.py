"""A process that compares pairs, and is killed when one takes more than its seconds of CPU time."""

import os
import resource
import subprocess
import sys
import time
from multiprocessing.connection import Connection

from purelm.align.graders.equality import equal
from purelm.align.graders.policy import Policy, Verdict
from purelm.align.graders.proof import prove

__all__ = ["Worker", "serve"]

WALL = 20  # seconds of wall time for each second of CPU time, after which a process counts as stuck
START = 120.0  # seconds for a process to start and import sympy
MEMORY = 4 << 30  # bytes of address space
CHILD = "import sys; sys.path[:] = {path!r}; from purelm.align.graders.worker import serve; serve({read}, {write})"
TIMEOUT = Verdict(False, "undecided: time")


def serve(read: int, write: int) -> None:
    """The loop of the process: (answer, gold, policy, seconds) by one file descriptor, a Verdict by the other."""
    inbox, outbox = Connection(read, writable=False), Connection(write, readable=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    try:
        import sympy  # noqa: F401  # so that no pair pays for it
    except ModuleNotFoundError:
        pass
    outbox.send(None)
    while True:
        try:
            answer, gold, policy, seconds = inbox.recv()
        except EOFError:
            return
        # The kernel counts whole seconds and ends the process: no signal handler, and no thread that must get time.
        until = int(time.process_time()) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            outbox.send(equal(answer, gold, policy, prove))
        except MemoryError:
            outbox.send(Verdict(False, "undecided: memory"))
        except ModuleNotFoundError as error:
            outbox.send(error)


class Worker:
    """One such process, started at the first use and again after each end."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen | None = None
        self.started = 0  # processes so far

    def equal(self, answer: str, gold: str, policy: Policy) -> Verdict:
        """`graders.equal` with a prover, in the process."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.outbox.send((answer, gold, policy, self.seconds))
            if self.inbox.poll(WALL * (self.seconds + 1)):
                found = self.inbox.recv()
                if isinstance(found, Exception):
                    raise found
                return found
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # it was ended
        self.stop()
        return TIMEOUT

    def start(self) -> None:
        """A new process. It is no fork: a fork of a process that has threads can hang."""
        self.stop()
        (read, out), (into, write) = os.pipe(), os.pipe()
        code = CHILD.format(path=sys.path, read=read, write=write)
        # A session of its own: Ctrl-C at a terminal is for the parent.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=(read, write), stdin=subprocess.DEVNULL, start_new_session=True
        )
        os.close(read)
        os.close(write)
        self.outbox, self.inbox = Connection(out, readable=False), Connection(into, writable=False)
        self.started += 1
        try:
            if self.inbox.poll(START):
                self.inbox.recv()
                return
        except EOFError:
            pass
        self.stop()
        raise RuntimeError("a worker process of purelm.align.graders did not start; its errors are on stderr")

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.outbox.close()
            self.inbox.close()
            self.process = None
