"""Small crawls, what a run leaves, and work for worker processes; imported by worker processes too, so light."""

import gzip
import hashlib
import json
import os
import random
import signal

from experiments.curate.work import Result
from tests.curate.warc_files import http, packed, record

WORDS = [a + b for a in ("ba", "ke", "li", "mo", "tu", "sha", "pre") for b in ("n", "rd", "st", "ll", "ve", "x", "th")]


def sentences(seed, n=60):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(n)) + "."


def rows(seeds, **more):
    return [{"id": f"row-{s}", "url": f"http://d{s % 3}.example.com/{s}", "text": sentences(s), **more} for s in seeds]


def write_rows(path, found):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in found).encode(), mtime=0))


def crawl(folder):
    """A WARC, a WET and two files of rows, with exact and near duplicates within and across."""
    folder.mkdir()
    page = "<html><body><p>{}</p></body></html>"
    pages = [record(http(page.format(sentences(s)).encode()), id=f"p{s}", url=f"http://w.org/{s}") for s in range(5)]
    pages.append(record(http(b"\x89PNG", content_type="image/png"), id="png"))
    (folder / "a.warc.gz").write_bytes(packed(pages))
    wet = [record(sentences(s).encode(), "conversion", id=f"c{s}", url=f"http://x.org/{s}") for s in range(3, 9)]
    (folder / "b.warc.wet.gz").write_bytes(packed(wet))
    near = rows([20])[0] | {"id": "near", "text": sentences(2)[:-1] + " end."}
    write_rows(folder / "c.jsonl.gz", [*rows(range(8, 14)), near, rows([4])[0] | {"text": "call 212-555-0123, <b>"}])
    write_rows(folder / "d.jsonl.gz", rows(range(12, 40)))
    return folder


def damaged(folder):
    """Inputs that are broken in all ways."""
    folder.mkdir()
    draw = random.Random(0)
    (folder / "binary.warc.gz").write_bytes(draw.randbytes(5000))
    bomb = record(http(gzip.compress(bytes(50 << 20)), extra="Content-Encoding: gzip\r\n"), id="bomb")
    odd = [
        bomb,
        record(b"", id="zero"),
        record(http(b"<p>bytes \xff\xfe\x80 that are no UTF-8, and one NUL \0 in it</p>"), id="odd"),
        record(b"a\xff\xfeb \0 c", "conversion", id="wet"),
        record(http(b"<p>" + b"x" * (3 << 20) + b"</p>"), id="long"),
        *[record(http(b"<p>Good page.</p>"), id="good")],
    ]
    (folder / "odd.warc.gz").write_bytes(packed(odd))
    (folder / "cut.warc.gz").write_bytes(packed([record(http(b"<p>First.</p>"), id="first")] * 2)[:-40])
    line = b'{"id": "line", "text": "' + b"y" * (3 << 20) + b'"}\n'
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(line + b'\xff\xfe\n{"text": "Whole."}\n', mtime=0))
    (folder / "empty.jsonl").write_bytes(b"")
    return folder


def tree(output):
    """A hash of each file of a run but for those that hold times, and Slurm's logs."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.relative_to(output).parts[0] not in ("timing", "report.html", "slurm")
    }


def final(output):
    """The documents in the order of the final shards."""
    from experiments.curate.files import rows_in

    return [row for path in sorted((output / "text").glob("*.jsonl.*")) for row in rows_in(path)]


def echo_or_die(task, tell):
    """Work whose task 2 ends its process, and whose task 4 finds the disk full."""
    if task.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.number == 4:
        return Result(task.name, "no space", True)
    tell(1, 10)
    return Result(f"{task.name} by {os.getpid()}")


KILLED = '''
import os, signal, sys
from pathlib import Path
from dataclasses import replace
from experiments.curate.config import Curate, Dedup, Filter, Final
from experiments.curate.run import curate

crawl, out, tokenizer = map(Path, sys.argv[1:4])
cfg = Curate((f"{crawl}/*",), out, Filter(languages=("all",), rules="none"),
             Dedup("near", memory_megabytes=0.01), Final(0.003, tokenizer), seed=3)
EVENTS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}
seen, last = 0, None

def hook(event, args):
    """The event number `last` within the output ends the process before it takes place."""
    global seen
    if last is not None and event in EVENTS and str(args[0]).startswith(str(out)):
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
os.fsync = lambda descriptor: None  # of no account to a process that is killed, and half of the time

def child(folder, at):
    """(signal that ended it or 0, its events)"""
    global out, last
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        out, last = folder, at
        sys.stderr = open(os.devnull, "w")
        curate(replace(cfg, output=folder))
        os.write(writer, str(seen).encode())
        os._exit(0)
    os.close(writer)
    n = os.read(reader, 100)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(n or 0)

status, events = child(out / "whole", 10**9)
assert status == 0
points = [events * i // 10 + 1 for i in range(10)]
for i, at in enumerate(points):
    status, _ = child(out / f"killed-{i}", at)
    assert status == -signal.SIGKILL, (i, status)
    if i % 2:  # killed twice
        child(out / f"killed-{i}", 25)
    assert child(out / f"killed-{i}", 10**9)[0] == 0
print(len(points))
'''
