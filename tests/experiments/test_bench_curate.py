"""experiments.bench.curate at toy size. Oracles: its rows, of each other; the rules' own counts."""

import importlib.util
import json

import pytest

from experiments.bench.all import Args, programs
from experiments.bench.curate import theirs
from purelm.curate.document import Document
from tests.curate.test_rules import SENTENCES
from tests.programs import run_here


@pytest.fixture
def web(tmp_path):
    texts = ["\n".join(SENTENCES[i : i + 10]) for i in range(5)] + ["Home", ""]
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_rows(web, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.bench.curate.datatrove_filters", dict)  # it takes seconds to load
    flags = ["--rounds", 1, "--peer-documents", 2, "--json", tmp_path / "rows.json"]
    done = run_here("experiments.bench.curate", "--data", web, *flags)
    assert done.returncode == 0 and "keeps 5 of 7 documents, and 2 of the first 2" in done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    megabytes, each = rows[::2], rows[1::2]
    size = sum(len(json.loads(line)["text"]) for line in web.read_text().splitlines()) / 1e6
    assert {row["unit"] for row in megabytes} == {"MB/s"} and {row["unit"] for row in each} == {"documents/s"}
    for a, b in zip(megabytes, each, strict=True):
        assert a["metric"] == b["metric"]
        if a["metric"].endswith("all"):
            assert a["value"] / b["value"] == pytest.approx(size / 7)
    assert {row["peer"] for row in rows} == {None, "datatrove"} and all(row["peer_value"] is None for row in rows)
    assert len(rows) == 2 * (13 + (importlib.util.find_spec("numba") is not None))


def test_files_without_documents(tmp_path):
    path = tmp_path / "web.jsonl"
    for text, message in (("", "no documents"), ('{"a": 1}\n', 'line 1: no "text" with a string')):
        path.write_text(text)
        done = run_here("experiments.bench.curate", "--data", path)
        assert done.returncode == 2 and message in done.stderr


def test_all_runs_it_on_a_folder_of_documents(web):
    assert ("curate", ["--data", str(web)]) in programs(Args("cpu", web.parent))


def test_peers_keep_what_no_filter_drops():
    pytest.importorskip("datatrove")

    class Filter:
        def __init__(self, verdict):
            self.verdict = verdict

        def filter(self, document):
            return self.verdict(document.text)

    long = Filter(lambda text: len(text) > 1)
    named = Filter(lambda text: True if "b" in text else (False, "no b"))
    documents = [Document(str(i), text) for i, text in enumerate(["a", "aa", "ab", "b"])]
    assert (theirs([long], documents), theirs([named], documents), theirs([long, named], documents)) == (2, 2, 1)
