"""experiments.curate: crawls to text. Oracles: the steps of purelm.curate one after the other in one loop; a run
without interruption; sums; Counter."""

import errno
import html
import io
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.curate import backends, page, run, shard, statistics
from experiments.curate.config import Cost, Curate, Dedup, Filter, Final, Slurm
from experiments.curate.files import append_packed, packed_lines, read_json
from experiments.curate.plan import Input, Task
from experiments.curate.shuffle import final_shard, keys_of
from experiments.curate.tokens import load_tokenizer, without
from purelm.curate.document import Document, Raw
from purelm.curate.extract import Extraction, extract
from purelm.curate.near_duplicates import near_duplicates
from purelm.curate.pii import PII, mask
from purelm.curate.read import records
from purelm.curate.skipped import Skipped
from purelm.data import DELIMITER, open_tokens
from purelm.tokenizer import decode, save, train
from tests.experiments.curate_runs import KILLED, WORDS, crawl, damaged, echo_or_die, final, sentences, tree, write_rows
from tests.programs import run_here

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Filter(languages=("all",), rules="none")  # the tests' words are of no language


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    """It is half of the time of small runs, and counts where power fails alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return crawl(tmp_path_factory.mktemp("curate") / "crawl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("curate") / "tokenizer.json"
    save(train([" ".join(WORDS)], 300, [DELIMITER]), path)
    return path


def config(web, output, **more):
    return replace(Curate((f"{web}/*",), output, PLAIN, final=Final(0.003), seed=3, examples=50), **more)


@pytest.fixture(scope="module")
def whole(web, tmp_path_factory):
    output = tmp_path_factory.mktemp("curate") / "whole"
    run.curate(config(web, output))
    return output


def by_hand(web):
    """(input, document) of what is kept by the steps, in the order of the inputs."""
    for number, path in enumerate(sorted(web.iterdir())):
        for item in records(path):
            if isinstance(item, Skipped):
                continue
            found = extract(item, Extraction()) if isinstance(item, Raw) else item
            if isinstance(found, Document):
                yield number, mask(found, PII())


def test_what_is_kept_and_in_which_order(web, whole):
    every = list(by_hand(web))
    texts = [document.text for _, document in every]
    cfg = shard.min_hash(config(web, whole))
    first = [texts.index(text) for text in texts]
    left = sorted(set(first))
    near = [left[i] for i in near_duplicates([texts[i] for i in left], cfg)]
    kept = {i for i, root in zip(left, near, strict=True) if i == root}
    assert len(kept) < len(left) < len(texts)  # there were duplicates of both kinds
    keys = [keys_of(3, number, 100) for number in range(4)]
    place = Counter()
    wanted = []
    for i, (number, document) in enumerate(every):
        if i in kept:
            wanted.append((int(keys[number][place[number]]), document.id, document.text))
        place[number] += 1
    found = final(whole)
    assert [(row["id"], row["text"]) for row in found] == [x[1:] for x in sorted(wanted)]
    assert len(list((whole / "text").iterdir())) > 2
    counts = read_json(whole / "counts.json")
    assert counts["duplicates"]["exact"] == len(texts) - len(left)
    assert counts["duplicates"]["near"] == len(left) - len(kept)
    assert counts["masked"] == {"phones": 1} and counts["funnel"]["extract"]["dropped"] == {"not HTML": 1}
    assert sum(x["documents"] for x in counts["text"]) == len(kept)


def test_the_last_lines_say_what_became_of_everything(whole):
    """Oracle: what lies in the run's folder; damage, steps that drop and duplicates have a line, other steps none."""
    counts = read_json(whole / "counts.json")
    lines = run.summary(counts)
    extracted, kept = counts["funnel"]["extract"], len(final(whole))
    assert f"extract: {extracted['kept']} of {extracted['documents']} documents kept" in lines
    assert not any(line.startswith("pii") for line in lines)
    duplicates = counts["duplicates"]
    said = f"{kept} documents left, without {duplicates['exact']} exact and {duplicates['near']} near duplicates"
    assert lines[-1] == said and lines[0].startswith(f"read {counts['read']['records']} records")
    damage = {"records": 5000, "size": 1, "skipped": {"damaged": 1200}}
    lines = run.summary({**counts, "read": damage, "places": [f"damaged: x, line {i}" for i in range(9)]})
    assert lines[:3] == ["read 5,000 records; skipped: 1,200 damaged", "  damaged: x, line 0", "  damaged: x, line 1"]
    assert sum(line.startswith("  damaged") for line in lines) == 5


def test_counts_add_up(whole):
    counts = read_json(whole / "counts.json")
    reached = counts["funnel"]["extract"]["kept"] + counts["read"]["records"] - counts["funnel"]["extract"]["documents"]
    for step, row in counts["funnel"].items():
        assert row["documents"] == row["kept"] + sum(row["dropped"].values())
        if step != "extract":
            assert row["documents"] == reached
            reached = row["kept"]
    assert reached == counts["kept"]["documents"] == counts["duplicates"]["documents"]
    parts = [read_json(path / "statistics.json") for path in sorted((whole / "stages" / "filter").iterdir())]
    both = statistics.merged([statistics.merged(parts[:3], 50), parts[3]], 50)
    assert both == statistics.merged(parts, 50) == {name: counts[name] for name in both}
    assert both["examples"]["kept"] == sorted(
        (x for part in parts for x in part["examples"]["kept"]), key=lambda x: (x["rank"], x["id"])
    )[:50]
    assert sum(counts["lengths"].values()) == sum(n for _, n in counts["domains"]) == reached


@pytest.mark.parametrize("kind", ["exact", "none"])
def test_other_ways_of_deduplication(web, tmp_path, kind):
    run.curate(config(web, tmp_path / "out", dedup=Dedup(kind), compression="gz"))
    texts = [document.text for _, document in by_hand(web)]
    assert sorted(row["text"] for row in final(tmp_path / "out")) == sorted(set(texts) if kind == "exact" else texts)


class Executor:
    """submitit's, in this process."""

    def __init__(self):
        self.sizes = []

    def map_array(self, function, items):
        self.sizes.append(len(items))
        return [Job(function, item) for item in items]


class Job:
    job_id = "7_0"

    def __init__(self, function, item):
        self.result = partial(function, item)


class Ray:
    """As much of it as is used; the newest task is done first."""

    def remote(self, **options):
        assert options == {"num_cpus": 1, "max_retries": 0}

        def decorated(function):
            self.function = function
            return self

        return lambda function: type("Remote", (), {"remote": staticmethod(lambda task: partial(function, task))})

    def wait(self, running, num_returns):
        return [running[-1]], running[:-1]

    def get(self, reference):
        return reference()


def test_back_ends_and_workers_give_the_same_bytes(web, whole, tmp_path, monkeypatch):
    run.curate(config(web, tmp_path / "two", workers=2))
    executor = Executor()
    run.curate(config(web, tmp_path / "slurm", backend="slurm", slurm=Slurm(array=3)), executor)
    monkeypatch.setattr(backends, "started_ray", lambda address: nullcontext(Ray()))
    run.curate(config(web, tmp_path / "ray", backend="ray", workers=3))
    assert executor.sizes[:3] == [3, 1, 3]  # four inputs by three jobs
    for name in ("two", "slurm", "ray"):
        assert tree(tmp_path / name) == tree(whole), name


def test_a_missing_back_end_is_named(web, tmp_path):
    for name in ("slurm", "ray"):
        if not any((Path(path) / {"slurm": "submitit"}.get(name, name)).exists() for path in sys.path):
            with pytest.raises(ValueError, match=rf"pip install 'purelm\[{name}\]'"):
                run.curate(config(web, tmp_path / "out", backend=name))


def tasks(n):
    cfg = Curate(("x",), Path("out"))
    return [Task(cfg, "filter", i, {}, (Input(f"in-{i}.warc.gz", 1, 0),)) for i in range(n)]


def test_a_worker_that_dies_is_named_and_the_others_go_on():
    told = []
    with closing(backends.Pool(echo_or_die)) as pool:
        results = list(backends.run_local(pool, tasks(4), 2, lambda *x: told.append(x)))
        fatal = list(backends.run_local(pool, tasks(9)[4:], 1, print))
    assert [x.error for x in fatal] == ["no space"]  # and nothing after it
    (dead,) = [x for x in results if x.error]
    assert dead.name == "filter in-2.warc.gz" and "was ended by SIGKILL" in dead.error
    names = {x.name.split(" by ")[0] for x in results if not x.error}
    assert names == {f"filter in-{i}.warc.gz" for i in (0, 1, 3)} and told == [(1, 10)] * 3
    assert str(os.getpid()) not in {x.name.split()[-1] for x in results}


def test_a_job_that_fails_names_its_tasks():
    def map_array(function, groups):
        def failed():
            raise RuntimeError("Job 7_0 ran\nout of memory")

        jobs = [Job(function, group) for group in groups]
        jobs[0].result = failed
        return jobs

    executor = type("Failing", (), {"map_array": staticmethod(map_array)})
    def work(task, tell):
        tell(task.number, 10)
        return backends.Result(task.name)

    told = []
    results = list(backends.run_slurm(work, tasks(5), executor, 2, lambda *more: told.append(more)))
    assert told == [(0, 0), (1 + 3, 20)]
    assert [x.name[10] for x in results if x.error == "job 7_0: out of memory"] == ["0", "2", "4"]
    assert [x.name[10] for x in results if x.error is None] == ["1", "3"]


def test_killed_at_any_moment(web, tokenizer, tmp_path):
    """Before each of many calls that open, rename, link or remove a file of the output; some runs twice."""
    command = [sys.executable, "-c", KILLED, web, tmp_path, tokenizer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = tree(tmp_path / "whole")
    assert any(name.startswith("tokens/train-00001") for name in wanted)
    for i in range(int(done.stdout)):
        assert tree(tmp_path / f"killed-{i}") == wanted, i


def test_other_settings_are_refused_by_name_and_redone_where_asked(web, whole, tmp_path):
    output = tmp_path / "out"
    own = tmp_path / "crawl"
    own.mkdir()
    for path in web.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    cfg = config(own, output)
    run.curate(cfg)
    before = tree(output)
    for changed, message in [
        ({"filter": replace(PLAIN, pii=False)}, "filter.pii True, now it is False"),
        ({"seed": 4}, "seed 3, now it is 4"),
        ({"dedup": Dedup(jaccard=0.7)}, "dedup.jaccard 0.8, now it is 0.7"),
        ({"final": Final(0.002)}, "final.shard_megabytes 0.003, now it is 0.002"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.curate(replace(cfg, **changed))
    assert tree(output) == before
    write_rows(own / "d.jsonl.gz", [{"text": "Other."}])
    with pytest.raises(ValueError, match=r"filter/00003: was made from .*d.jsonl.gz"):
        run.curate(cfg)
    run.curate(replace(cfg, redo=True))
    size = (own / "d.jsonl.gz").stat().st_size
    write_rows(own / "d.jsonl.gz", [{"text": "Third."}])
    assert (own / "d.jsonl.gz").stat().st_size == size
    with pytest.raises(ValueError, match=r"filter/00003: was made from .*d.jsonl.gz"):
        run.curate(cfg)
    run.curate(replace(cfg, redo=True))
    assert "Third." in {row["text"] for row in final(output)}
    (own / "d.jsonl.gz").unlink()
    with pytest.raises(ValueError, match="filter/00003: is of a run with more parts"):
        run.curate(cfg)
    run.curate(replace(cfg, redo=True))
    run.curate(replace(cfg, output=tmp_path / "fresh"))
    assert tree(output) == tree(tmp_path / "fresh") != before


def test_inputs_and_outputs_that_cannot_be(web, tmp_path):
    (tmp_path / "link.jsonl.gz").symlink_to(web / "c.jsonl.gz")
    (tmp_path / "data.xyz").write_text("")
    for change, message in [
        ({"input": ("/nowhere/*.warc.gz",)}, "no such file"),
        ({"input": (f"{tmp_path}/data.xyz",)}, "names end in"),
        ({"input": (f"{web}/*", f"{tmp_path}/link.jsonl.gz")}, "is the same file as"),
        ({"input": (str(tmp_path),)}, "no .parquet file in it"),
        ({"output": web}, "holds the input"),
        ({"dedup": Dedup(n_bands=13)}, "n_bands must divide"),
        ({"filter": Filter(domains=tmp_path / "none")}, "none"),
        ({"filter": Filter(classifier="os:nothing")}, "filter.classifier 'os:nothing'"),
        ({"filter": replace(PLAIN, classifier="os:getcwd")}, "filter.classifier 'os:getcwd': its source"),
        ({"filter": Filter(languages=("en", "EN"))}, "filter.languages 'EN': it knows .*, en,"),
        ({"filter": Filter(languages=("en", "all"))}, "filter.languages 'all': all stands alone"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            run.curate(replace(config(web, tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


def test_a_full_disk(web, whole, tmp_path, monkeypatch):
    """The second input's write fails: no other is begun, nothing of it is left, and the run goes on from there."""
    output, calls = tmp_path / "out", []

    def full(document):
        calls.append(document)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return line_of(document)

    line_of = shard.line_of
    with monkeypatch.context() as patch:
        patch.setattr(shard, "line_of", full)
        with pytest.raises(ValueError, match=r"1 of 4 parts failed, .*b.warc.wet.gz.*No space left.*start again"):
            run.curate(config(web, output))
    assert len(calls) == 9
    assert [path.name for path in (output / "stages" / "filter").iterdir()] == ["00000"]
    assert {path.name for path in output.iterdir()} == {"stages", "timing"}
    run.curate(config(web, output))
    assert tree(output) == tree(whole)


def test_damaged_inputs_are_counted_and_the_run_goes_on(tmp_path):
    web, output = damaged(tmp_path / "crawl"), tmp_path / "out"
    run.curate(config(web, output, filter=replace(PLAIN, most_megabytes=2.0)))
    skipped = read_json(output / "counts.json")["read"]["skipped"]
    want = {"not a WARC file": 1, "too large": 3, "empty": 1, "truncated": 1, "damaged": 1}
    assert {name: n for name, n in skipped.items() if name in want} == want
    texts = {row["id"]: row["text"] for row in final(output)}
    assert texts["urn:uuid:good"] == "Good page." and texts["urn:uuid:wet"] == "a\ufffd\ufffdb \0 c"
    assert "Whole." in texts.values() and "First." in texts.values()
    places = read_json(output / "counts.json")["places"]
    assert any(place.startswith("not a WARC file") and "binary.warc.gz" in place for place in places)


def test_a_classifier_is_a_step(web, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_step.py").write_text(
        "from purelm.curate.document import Drop\n"
        "def step(document):\n    return document if 'ban' in document.text else Drop('no ban', 1)\n"
    )
    cfg = config(web, tmp_path / "out", filter=replace(PLAIN, classifier="own_step:step"), dedup=Dedup("none"))
    run.curate(cfg)
    texts = [document.text for _, document in by_hand(web)]
    assert sorted(row["text"] for row in final(cfg.output)) == sorted(text for text in texts if "ban" in text)
    (tmp_path / "own_step.py").write_text("step = print\n# other\n")
    with pytest.raises(ValueError, match="classifier's content"):
        run.curate(cfg)


def test_tokens_are_the_final_text_with_its_ends(web, tokenizer, tmp_path):
    own = tmp_path / "crawl"
    own.mkdir()
    texts = [f"{sentences(1)} {DELIMITER} <|endof{DELIMITER}text|> z", "Two."]
    write_rows(own / "x.jsonl.gz", [{"text": text} for text in texts])
    run.curate(config(own, tmp_path / "out", final=Final(1, tokenizer)))
    tokens = open_tokens(tmp_path / "out" / "tokens", verify=True)
    text = decode(load_tokenizer(tokenizer), tokens.tokens.tolist())
    plain = [row["text"].replace(DELIMITER, "").replace(DELIMITER, "") for row in final(tmp_path / "out")]
    assert text.split(DELIMITER) == [*plain, ""]


@given(st.text("<x>", max_size=30))
def test_no_name_of_a_special_token_is_left(text):
    """Oracle: one name replaced until there is none; of two names, that there is none."""
    one = text
    while "<x>" in one:
        one = one.replace("<x>", "")
    assert without(text, ("<x>",)) == one
    found = without(text, ("<x>", "<x>x>"))
    assert "<x>" not in found and (found == text) == ("<x>" not in text)


def test_nested_names_end():
    """A million, for which one pass each would take hours."""
    assert without("a" + "<" * 10**6 + "x>" * 10**6 + "b", ("<x>",)) == "ab"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), max_size=25), st.integers(1, 4))
def test_examples_do_not_depend_on_order(found, most):
    def of(some):
        examples = statistics.Examples(5, most)
        for kind, number in some:
            examples.add(kind, Document(str(number), f"text {number}"))
        return examples.as_json()

    want = {}
    for kind in sorted({kind for kind, _ in found}):
        ranks = sorted({(statistics.rank(5, str(n)), str(n)) for k, n in found if k == kind})
        want[kind] = [id for _, id in ranks[:most]]
    assert {kind: [x["id"] for x in some] for kind, some in of(found[::-1]).items()} == want


def test_domains_in_several_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "SHARDS_AT_ONCE", 1)
    parts = [{f"d{i}.org": i % 7 + j for i in range(j, 40, j + 1)} for j in range(3)]
    paths = [tmp_path / f"{j}.json" for j in range(3)]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(str(part).replace("'", '"'))
    total = sum(map(Counter, parts), Counter())
    assert statistics.top_domains(paths, 9) == sorted(total.items(), key=lambda x: (-x[1], x[0]))[:9]


@given(st.integers(0, 2**64 - 1), st.integers(1, 10**6))
def test_final_shards_are_equal_parts_of_the_keys(key, n):
    found = int(final_shard(np.array([key], np.uint64), n)[0])
    assert 0 <= found < n and found == (key >> 32) * n >> 32


def test_the_page_shows_markup_as_text(web, whole):
    evil = '<script>alert("x")</script>'
    counts = read_json(whole / "counts.json")
    counts["examples"] = {f"rules: {evil}": [{"id": evil, "url": evil, "text": evil, "value": evil}]}
    counts["languages"], counts["domains"], counts["places"] = {evil: 1}, [[evil, 1]], [evil]
    counts["duplicates"]["largest"] = [{"documents": 2, "members": [{"id": evil, "url": "", "text": evil}]}]
    counts["read"]["skipped"] = {evil: 1}
    cfg = config(web, Path(f"out{evil.replace('/', '')}"))
    found = page.page(cfg, [Input(evil, 1, 0)], counts, [])
    assert "<script" not in found and found.count("&lt;script&gt;") > 8
    report = (whole / "report.html").read_text()
    assert "&lt;b&gt;" in report and "call |||PHONE_NUMBER|||" in report and " src=" not in report


def test_the_page_shows_as_much_of_a_document_as_is_asked_for(web, whole):
    """Oracle: the examples and members of clusters themselves. Markup is counted before it is escaped."""
    counts = read_json(whole / "counts.json")
    members = [x for cluster in counts["duplicates"]["largest"] for x in cluster["members"]]
    members[0]["text"] = "<&>" * 50
    texts = [x["text"] for x in (*members, *(y for some in counts["examples"].values() for y in some))]
    for most in (0, 20, 1500):
        made = page.page(config(web, Path("out"), excerpt=most), [], counts, [])
        shown = [html.unescape(x) for x in re.findall("<pre>(.*?)</pre>", made, re.S)[:-1]]
        assert sorted(shown) == sorted(text[:most] for text in texts)


def test_the_estimate():
    """2 CPU seconds for 1 MB as stored: 5,000 files of 75 MB take 750,000 s."""
    times = [{"cpu_seconds": 1.5, "stored_bytes": 10**6}, {"cpu_seconds": 0.5, "stored_bytes": 0}]
    hours, dollars = page.estimate(times, Cost(0.04, 75.0), 5000)
    assert (hours, dollars) == (pytest.approx(750_000 / 3600), pytest.approx(750_000 / 3600 * 0.04))
    assert page.estimate([], Cost(), 5000) is None


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_packed_bytes_do_not_hold_the_time(compression, monkeypatch):
    packed = []
    for now in (1e9, 2e9):
        file = io.BytesIO()
        monkeypatch.setattr(time, "time", lambda now=now: now)
        for part in (b"one\n", b"two\nthree\n"):
            with append_packed(file, compression) as out:
                out.write(part)
        packed.append(file.getvalue())
    assert packed[0] == packed[1]
    assert list(packed_lines(io.BytesIO(packed[0]), compression)) == [b"one\n", b"two\n", b"three\n"]


def test_real_crawls_by_the_command(shared_data, tmp_path):
    """English rules and languages; what the page says is in its words."""
    done = run_here("experiments.curate.__main__", "--input", shared_data / "warc" / "cc-whirlwind.warc*gz",
                    shared_data / "web" / "*.gz", "--output", tmp_path / "out", "--examples", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = read_json(tmp_path / "out" / "counts.json")
    assert counts["languages"]["en"] == counts["funnel"]["rules"]["documents"] > 200
    assert 50 < sum(x["documents"] for x in counts["text"]) < 200
    bad = run_here("experiments.curate.__main__", "--input", "x.warc", "--output", tmp_path / "b", "--workers", 0)
    assert bad.returncode == 2 and "workers must be at least 1" in bad.stderr
    bad = run_here("experiments.curate.__main__", "--input", "x.warc", "--output", tmp_path / "b", "--excerpt", 1501)
    assert bad.returncode == 2 and "excerpt must be at least 0 and at most 1,500, got 1501" in bad.stderr
