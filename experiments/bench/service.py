"""The training service under load, and under kill -9: nothing lost, nothing charged twice.

python -m experiments.bench.service [--submissions 1000] [--clients 50] [--kills 50] [--json FILE]

A real server (uvicorn, SQLite, worker processes) on this machine and a process of clients, each with a connection of
its own and one request at a time. A submission's latency is from its first byte out to its answer's last byte in; it is
on the disk by then. The back end waits and trains nothing. With --kills, the server or one of its workers is killed
again and again while submissions go on, a killed server is started again, and clients repeat what got no answer. Then
every submission must be there once, have its own losses, and be charged once.
"""

import asyncio
import contextlib
import json
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from experiments.bench.report import publish, row
from experiments.bench.service_server import EACH, expected
from experiments.console import program, say
from experiments.limits import Count, Place, Range, Seed, Whole
from experiments.scaling.service import keys
from experiments.scaling.service.schemas import TrainingConfig
from experiments.scaling.service.store import FILE, create, open_store

STATES = "SELECT state, COUNT(*) FROM runs GROUP BY state"
EVENTS = "SELECT kind, COUNT(*) FROM events GROUP BY kind"
PACKAGES = ("purelm", "fastapi", "uvicorn", "pydantic")
LOOK = 0.02  # seconds between looks for a run to kill
LEAVE = 120.0  # seconds that a server may take to end: its workers have 30
Seconds = Annotated[float, Range(0, 60)]


@dataclass(frozen=True)
class Args:
    """The training service under load."""

    submissions: Count = 1000
    clients: Count = 50
    keys: Annotated[int, Range(1, 100)] = 10
    slots: Annotated[int, Range(1, 64)] = 2
    evals: Annotated[int, Range(1, 64)] = 4
    """evaluations of a run"""
    seconds: Seconds = 0.02
    """that an evaluation takes"""
    kills: Whole = 0
    """of the server or a worker, at random times"""
    seed: Seed = 0
    json: Place | None = None


def body(i: int, evals: int) -> dict[str, Any]:
    """The i-th configuration."""
    return {
        "architecture_config": {
            "attention_bias": False, "head_dim": 64, "hidden_size": 512, "intermediate_size": 1408,
            "num_attention_heads": 8, "num_hidden_layers": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
            "rope_theta": 10_000, "tie_word_embeddings": False, "dtype": "bfloat16", "vocab_size": 32_000,
        },
        "optimizer_config": {
            "lr_scheduler": {"peak_value": 3e-4, "final_lr_frac": 0.1, "warmup_frac": 0.05, "init_value": 0.0},
            "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "eps_root": 0.0, "grad_clip_norm": 1.0,
        },
        "train_batch_size": 64, "val_batch_size": 64, "n_evals": evals, "total_train_tokens": 512 * 64 * evals * 100,
        "max_runtime_seconds": 600.0, "model_seed": i,
    }  # fmt: skip


class Connection:
    """One kept connection that speaks as much HTTP as is needed here, so that clients take little of the cores."""

    def __init__(self, port: int, key: str):
        self.port, self.key = port, key
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, data: bytes = b"") -> tuple[int, dict[str, str], Any]:
        """Status, headers, JSON; an OSError or EOFError where the connection broke."""
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.streams
            head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {self.key}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
            text = await reader.readexactly(int(headers["content-length"]))
        except (OSError, EOFError):
            self.close()
            raise
        return int(lines[0].split()[1]), headers, json.loads(text) if text else None

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


@dataclass
class Found:
    """What the clients saw."""

    ids: dict[int, int]  # configuration -> experiment
    seconds: list[float]
    repeated: int = 0
    wall: float = 0.0  # seconds from the first submission to the last answer
    cpu: float = 0.0  # seconds of the server's process meanwhile, workers not counted


async def submit_all(
    args: Args, port: int, texts: list[str], each: float = 0.0, cpu: Callable[[], float] = lambda: 0.0
) -> Found:
    """Every configuration once, by clients that take the next one; repeated until it has an answer."""
    found, left = Found({}, []), iter(range(args.submissions))
    start = asyncio.Event()

    async def client(c: int) -> None:
        connection = Connection(port, texts[c % len(texts)])
        while True:  # until the server is up, and knows the key
            with contextlib.suppress(OSError, EOFError):
                assert (await connection.ask("GET", "/budget"))[0] == 200
                break
            await asyncio.sleep(0.1)
        await start.wait()
        for i in left:
            data = json.dumps(body(i, args.evals)).encode()
            # One key for a configuration: that of the client which took it.
            while i not in found.ids:
                begun = time.perf_counter()
                try:
                    status, headers, answer = await connection.ask("POST", "/submit", data)
                except (OSError, EOFError):
                    found.repeated += 1
                    await asyncio.sleep(0.05)
                    continue
                found.seconds.append(time.perf_counter() - begun)
                if status == 200:
                    found.ids[i] = answer["experiment_id"]
                elif status == 409:  # accepted before the answer was lost
                    found.ids[i] = int(headers["x-experiment-id"])
                elif status != 503:
                    raise ValueError(f"submission {i}: {status} {answer}")
            await asyncio.sleep(each)
        connection.close()

    tasks = [asyncio.create_task(client(c)) for c in range(args.clients)]
    await asyncio.sleep(1.0)
    before, begun = cpu(), time.perf_counter()
    start.set()
    await asyncio.gather(*tasks)
    found.cpu, found.wall = cpu() - before, time.perf_counter() - begun
    return found


class Server:
    """The server's process, and those that it starts."""

    def __init__(self, args: Args, folder: Path):
        self.args, self.folder = args, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = self.begin()

    def begin(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments.bench.service_server", str(self.folder), str(self.port),
                   str(self.args.slots), str(self.args.seconds)]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        """kill -9, and start again."""
        self.process.kill()
        self.process.wait()
        self.process = self.begin()

    def kill_worker(self, rng: random.Random) -> bool:
        """kill -9 of one of its workers; False where it has none yet."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            if workers := psutil.Process(self.process.pid).children():
                rng.choice(workers).kill()
                return True
        return False

    def cpu(self) -> float:
        """Seconds that the server's process has computed; 0 where it is gone."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(self.process.pid).cpu_times()
            return times.user + times.system
        return 0.0

    def end(self) -> None:
        """SIGTERM; kill -9 and an error where that does not end it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(LEAVE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise ValueError(f"the server had not ended {LEAVE:g} s after SIGTERM; killed\n{self.log()}") from None

    def log(self) -> str:
        """Its last lines."""
        return (self.folder / "server.log").read_text(errors="replace")[-3000:]


def counted(folder: Path, sql: str) -> Counter[str]:
    """Rows by name: of runs by their state, of events by their kind."""
    db = sqlite3.connect(f"{(folder / FILE).as_uri()}?mode=ro", uri=True)
    with contextlib.closing(db):
        return Counter(dict(db.execute(sql)))


async def killing(args: Args, server: Server, over: Callable[[], bool]) -> Counter[str]:
    """The kills, by turns of the server and of a worker that has a run; fewer where all runs are over before."""
    rng, killed = random.Random(args.seed), Counter[str]()
    while killed.total() < args.kills and not over():
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        if killed.total() % 2 == 0:
            server.kill()
            killed["server"] += 1
            continue
        while not over():
            if counted(server.folder, STATES)["running"] and server.kill_worker(rng):
                killed["worker"] += 1
                break
            await asyncio.sleep(LOOK)
    return killed


async def watch(server: Server) -> NoReturn:
    """Raises when the server has ended and was not killed: nobody would answer the clients any more."""
    while server.process.poll() is None:
        await asyncio.sleep(0.2)
    raise ValueError(f"the server ended with status {server.process.returncode}\n{server.log()}")


def _open(folder: Path) -> Counter[str]:
    """Runs that have not ended, by their state."""
    return Counter({state: n for state, n in counted(folder, STATES).items() if state in ("queued", "running")})


def check(args: Args, folder: Path, found: Found) -> dict[str, int]:
    """What must be 0: submissions lost or doubled, runs unfinished, with other losses, not charged once."""
    store = open_store(folder)
    with store.read() as db:
        runs = {r["id"]: r for r in db.execute("SELECT * FROM runs")}
        seeds = Counter(TrainingConfig.model_validate_json(r["config"]).model_seed for r in runs.values())
        ends = Counter(
            r["run"] for r in db.execute("SELECT run FROM events WHERE kind IN ('completed', 'timeout', 'failed')")
        )
        used = db.execute("SELECT TOTAL(MIN(MAX(used, 1), seconds)) FROM runs").fetchone()[0]
    store.close()
    bad = Counter(lost=0, doubled=0, unfinished=0, other_losses=0, charged_otherwise=0)
    for i in range(args.submissions):
        run = runs.get(found.ids[i])
        bad["lost"] += run is None or seeds[i] == 0
        bad["doubled"] += seeds[i] > 1 or ends[found.ids[i]] > 1
        if run is not None:
            cfg = TrainingConfig.model_validate_json(run["config"])
            bad["lost"] += cfg.model_seed != i
            bad["unfinished"] += run["state"] != "completed"
            bad["other_losses"] += tuple(json.loads(run["val_losses"])) != expected(cfg)
            bad["charged_otherwise"] += run["used"] != EACH * args.evals
    bad["doubled"] += len(runs) - len(seeds)
    bad["charged_otherwise"] += used != EACH * args.evals * args.submissions
    return dict(bad)


async def measure(args: Args, folder: Path) -> tuple[Found, Counter[str]]:
    """Submit all, kill meanwhile, wait until all runs have ended: what clients saw, and the kills."""
    store = create(folder, {"backend": "surrogate"})
    texts, salt = [f"{i:08}" for i in range(args.keys)], store.meta()["salt"]
    with store.write() as db:
        for i, text in enumerate(texts):
            keys.add_key(db, f"key {i}", keys.hashed(text, salt), 600.0 * args.submissions + 1, i, time.time())
    store.close()
    server = Server(args, folder)

    async def load() -> tuple[Found, Counter[str]]:
        # With kills the submissions take about as long as these.
        each = 1.6 * args.kills * args.clients / args.submissions
        submitting = asyncio.create_task(submit_all(args, server.port, texts, each, server.cpu))

        def over() -> bool:
            return submitting.done() and (submitting.exception() is not None or not _open(folder))

        killed = await killing(args, server, over)
        found = await submitting
        last, since = Counter[str](), time.monotonic()
        while now := _open(folder):
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > 60:
                say(f"no run has ended for a minute: {dict(now)}")
                break
            await asyncio.sleep(0.2)
        return found, killed

    try:
        loading, watching = asyncio.create_task(load()), asyncio.create_task(watch(server))
        await asyncio.wait((loading, watching), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            watching.result()  # raises
        watching.cancel()
        return loading.result()
    finally:
        server.end()


@program
def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found, killed = asyncio.run(measure(args, Path(folder)))
        bad = check(args, Path(folder), found)
        told = counted(Path(folder), EVENTS)
        log = (Path(folder) / "server.log").read_text()
    name = f"{args.submissions} submissions, {args.clients} clients"
    if args.kills:
        name += f", {killed['server']} kills of the server and {killed['worker']} of workers"
    rows = [row(f"{name}: {what}", n, "runs", packages=PACKAGES) for what, n in bad.items()]
    if args.kills:
        rows.append(row(f"{name}: requests repeated", found.repeated, "requests", packages=PACKAGES))
        # Else the kills would have hit nothing.
        for kind, what in (("lost", "attempts that were killed"), ("preempted", "attempts put aside by workers")):
            rows.append(row(f"{name}: {what}", told[kind], "attempts", packages=PACKAGES))
    else:
        parts = statistics.quantiles(found.seconds, n=100, method="inclusive")
        for what, value in (("p50", parts[49]), ("p99", parts[98]), ("slowest", max(found.seconds))):
            rows.append(row(f"{name}: {what}", 1e3 * value, "ms", packages=PACKAGES))
        rows.append(row(f"{name}: server's CPU time each", 1e3 * found.cpu / args.submissions, "ms", packages=PACKAGES))
        rows.append(row(f"{name}: rate", args.submissions / found.wall, "submissions/s", packages=PACKAGES))
    publish(rows, args.json)
    if killed.total() < args.kills:
        n = killed.total()
        raise ValueError(f"all runs had ended after {n} of {args.kills} kills: give more --submissions or --seconds")
    if any(bad.values()):
        say(log[-3000:])
        raise ValueError(f"not every submission was carried out and charged once: {bad}")


if __name__ == "__main__":
    main(tyro.cli(Args))
