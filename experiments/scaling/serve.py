"""Serve the training API of CS336's third assignment on this machine, on purelm's own models or a simulation.

    python -m experiments.scaling.serve --add-key ada --data train.bin --val val.bin   # prints a key, once
    python -m experiments.scaling.serve --data train.bin --val val.bin --slots 1 --budget-seconds 3600
    python -m experiments.scaling.serve --backend surrogate --folder runs/practice    # milliseconds a run

It keeps all in FOLDER: service.sqlite3, a folder for each run, and the workers' logs. It may be killed at any time:
what was accepted is there when it starts again. README.md beside this file is a walk-through; the client is client.py.
"""

import contextlib
import dataclasses
import importlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro

from experiments.console import program, say
from experiments.limits import Count, Place, Range, Seed, Text, Whole
from experiments.lock import locked
from experiments.scaling.service import keys
from experiments.scaling.service.room import reason
from experiments.scaling.service.schemas import Rules
from experiments.scaling.service.store import BUSY, FILE, Store, connect, create, open_store

Seconds = Annotated[float, Range(1, 1e9)]
NAMES = {"127.0.0.1": "127.0.0.1", "localhost": "localhost", "::1": "[::1]"}


@dataclass(frozen=True)
class Serve:
    """A training service with budgets."""

    folder: Place = Path("runs/service")
    backend: Literal["real", "surrogate"] = "real"
    """real: trains on --data; surrogate: a hidden law for each key, which says so in every answer"""
    data: Place | None = None
    """token file, or folder of shards, that runs train on"""
    val: Place | None = None
    """token file of other texts"""
    seq_len: Count = 512
    n_val_tokens: Count = 2**18
    """validation tokens in each evaluation"""
    device: Text = "auto"
    """cpu, cuda or auto"""
    compile: Literal["auto", "yes", "no"] = "auto"
    """auto: on a GPU. A run takes up to a minute longer to begin, which its clock does not count"""
    graph: Literal["auto", "yes", "no"] = "auto"
    """each update is a replay of a CUDA graph; auto: on a GPU"""
    rows: Whole = 0
    """most sequences in one pass: larger batches are accumulated; 0: all"""
    time_scale: Annotated[float, Range(0, 100)] = 0.0
    """surrogate: seconds that a simulated second takes; 0: an answer at once"""
    host: Text = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    """0: one that is free"""
    public: bool = False
    """allow a --host that others can reach. There is no encryption: use a tunnel, and --long-keys"""
    allow_host: tuple[Text, ...] = ()
    """more names that requests may be for, beside --host"""
    slots: Whole = 0
    """runs at once; 0: one for each GPU, without any 1"""
    budget_seconds: Seconds = 43_200
    """device-seconds of a new key"""
    final: Annotated[float, Range(0.01, 1e6)] = 4.0
    """budgets of a key that its final run may take"""
    setup_seconds: Seconds = 1800
    """that a run may take to load and compile, before its clock runs"""
    grace_seconds: Annotated[float, Range(0, 3600)] = 30
    """that runs have to put themselves aside in when the server is ended"""
    add_key: Text | None = None
    """make a key for this name, print it, and end; the server may be running"""
    long_keys: bool = False
    """--add-key: 43 characters; without it 8 digits, which the course's client insists on and which can be guessed"""
    key_seed: Seed | None = None
    """--add-key: what the surrogate's hidden law is drawn from, in place of a random number"""
    remove_key: Text | None = None
    """this name's key opens nothing any more"""
    list_keys: bool = False


class Ready(NamedTuple):
    """What the flags come to."""

    module: Any  # real or surrogate
    settings: Any  # its dataclass
    rules: Rules
    facts: dict[str, Any]  # what must not change while a folder lives


@program
def main(args: Serve) -> None:
    if args.add_key is not None or args.remove_key is not None or args.list_keys:
        manage(args)
        return
    if args.host not in NAMES and not args.public:
        raise ValueError(f"host {args.host}: others can reach it; say --public if that is meant")
    from experiments.scaling.service.app import create_app
    from experiments.scaling.service.guard import LOOPBACK
    from experiments.scaling.service.running import bind, serve
    from experiments.scaling.service.supervisor import Supervisor
    from experiments.scaling.service.worker import Plan

    slots = slots_of(args)
    with prepared(args) as (store, ready), bind(args.host, args.port) as sock:
        backend = ready.module.backend(ready.settings)
        plan = Plan(args.folder.absolute(), ready.module.backend, ready.settings, ready.rules,
                    runs=1 if args.backend == "real" else None)  # fmt: skip
        hosts = {*LOOPBACK, *args.allow_host, args.host}
        app = create_app(
            store, ready.rules, backend.name, reveal=backend.reveal, final=args.final,
            hosts=None if args.host in ("0.0.0.0", "::") and not args.allow_host else hosts,
        )  # fmt: skip

        def announce() -> None:
            url = f"http://{NAMES.get(args.host, args.host)}:{sock.getsockname()[1]}"
            say(f"{url}  dashboard: {url}/dashboard  back end: {backend.name}  slots: {len(slots)}")
            if backend.name == "surrogate":
                say("the surrogate trains nothing: losses come from a hidden law, and every answer says so")
            if args.host not in NAMES:
                say(f"warning: others can reach {args.host}, and nothing is encrypted")
            with store.read() as db:
                if not keys.all_keys(db):
                    say(f"no keys yet: python -m experiments.scaling.serve --folder {args.folder} --add-key NAME")

        ahead = any(env.get("CUDA_VISIBLE_DEVICES") for env in slots)  # cores that runs leave free
        supervisor = Supervisor(store, plan, slots, setup=args.setup_seconds, ahead=ahead)
        serve(app, supervisor, sock, grace=args.grace_seconds, ready=announce)


@contextmanager
def prepared(args: Serve) -> Iterator[tuple[Store, Ready]]:
    """The store of the folder, made if need be, with the folder's lock. ValueError if it was made for other runs."""
    from experiments.scaling.service.alive import check_locks

    with locked(args.folder, "--folder"):
        made = (args.folder / FILE).exists()
        kept = open_store(args.folder).meta() if made else {"secret": secrets.randbits(62)}
        ready = ready_of(args, kept["secret"])
        if not made:
            create(args.folder, ready.facts).close()
        check_locks(args.folder)
        store = open_store(args.folder)
        try:
            same_facts(args.folder, store.meta(), ready.facts)
            # One connection stays: with the last one SQLite removes the index of its log, which a full disk does not
            # take again, so that nothing could even be read.
            with contextlib.closing(connect(store.path, BUSY)) as stays:
                stays.execute("SELECT 1 FROM meta").fetchone()
                yield store, ready
        finally:
            store.close()


def same_facts(folder: Path, kept: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError that names what a folder was made with and is now otherwise."""
    for name, value in now.items():
        if kept.get(name) != value:
            raise ValueError(
                f"folder {folder}: was made with {name} {kept.get(name)}, and now it is {value}; "
                "its losses would not be comparable: take another --folder"
            )


def ready_of(args: Serve, secret: int) -> Ready:
    """Back end, its settings and rules."""
    module = importlib.import_module(f"experiments.scaling.service.{args.backend}")
    facts: dict[str, Any] = {"backend": args.backend, "secret": secret}
    if args.backend == "surrogate":
        if args.data is not None or args.val is not None:
            raise ValueError("data: the surrogate trains on nothing; leave --data and --val out")
        settings = module.Surrogate(secret=secret, time_scale=args.time_scale)
        rules = Rules(seq_len=args.seq_len, n_val_tokens=args.n_val_tokens)
        fixed = dataclasses.asdict(settings)
        del fixed["time_scale"], fixed["secret"]
        facts["settings"] = fixed
    else:
        if args.data is None or args.val is None:
            raise ValueError("data: give --data and --val, or --backend surrogate")
        from purelm.data import open_tokens

        settings = module.Real(
            train=args.data.absolute(), val=args.val.absolute(), seq_len=args.seq_len, n_val_tokens=args.n_val_tokens,
            device=args.device, compile=args.compile,
            graph=args.graph, rows=args.rows,
        )  # fmt: skip
        rules = module.rules_of(settings)
        facts["data"] = [module.sampled(open_tokens(path)) for path in (args.data, args.val)]
        settings = dataclasses.replace(settings, expected=tuple(facts["data"]))
    return Ready(module, settings, rules, {**facts, "rules": rules.model_dump(mode="json")})


def slots_of(args: Serve) -> list[dict[str, str]]:
    """Environment of each slot's worker: a GPU of its own, or its part of the cores."""
    on_gpu = args.backend == "real" and args.device != "cpu" and torch.cuda.is_available()
    if args.device.startswith("cuda") and args.backend == "real" and not on_gpu:
        raise ValueError(f"device {args.device}: there is no GPU here")
    if args.graph == "yes" and args.backend == "real" and not on_gpu:
        raise ValueError("graph yes: needs a GPU")
    if not on_gpu:
        n = args.slots or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // n))
        return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}] * n
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if args.slots > len(devices):
        raise ValueError(f"slots must be at most {len(devices)}, one for each GPU, got {args.slots}")
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[: args.slots or None]]


def manage(args: Serve) -> None:
    """Add, remove or list keys, beside a running server too."""
    if not (args.folder / FILE).exists():
        if args.add_key is None:
            raise ValueError(f"folder {args.folder}: there is no service in it")
        with prepared(args):
            pass
    store = open_store(args.folder)
    try:
        _manage(args, store)
    except sqlite3.OperationalError as error:
        text = reason(error, args.folder)
        raise ValueError(f"folder {args.folder}: {text}; no key was added or removed, whatever was shown") from None
    finally:
        store.close()


def _manage(args: Serve, store: Store) -> None:
    text = keys.new_key(args.long_keys)
    hash_ = keys.hashed(text, store.meta()["salt"])
    if args.remove_key is not None or args.add_key is not None:
        with store.write() as db:
            if args.remove_key is not None:
                keys.remove_key(db, args.remove_key, time.time())
            if args.add_key is not None:
                seed = secrets.randbits(62) if args.key_seed is None else args.key_seed
                keys.add_key(db, args.add_key, hash_, args.budget_seconds, seed, time.time())
                # Before it is stored: a key that could not be shown, since the disk is full or so, would be lost.
                say(f"the key of {args.add_key}, for {args.budget_seconds:g} device-seconds; it is shown this once:")
                print(text, flush=True)
        if args.remove_key is not None:
            say(f"the key of {args.remove_key} is removed; its runs stay")
    if args.list_keys:
        from experiments.scaling.service.ledger import budget

        with store.read() as db:
            for key in keys.all_keys(db):
                used = budget(db, key).used_seconds
                print(f"{key.name}: {used:g} of {key.budget:g} device-seconds used or reserved")


if __name__ == "__main__":
    main(tyro.cli(Serve))
