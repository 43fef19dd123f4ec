"""The dashboard and the API's page. Oracles: their source; Chromium, where there is one, under the policy sent."""

import html.parser
import re
import shutil
import subprocess
import time

import pytest

pytest.importorskip("uvicorn")
from starlette.testclient import TestClient

from experiments.scaling.service import dispatch, ledger, pages
from experiments.scaling.service.app import create_app
from experiments.scaling.service.backend import Broken, Done
from experiments.scaling.service.schemas import Rules
from tests.scaling.service_parts import TEXT, make_store, parsed, served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=document.title='taken'> & \"quoted\""


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    store, _ = make_store(tmp_path_factory.mktemp("store"))
    with TestClient(create_app(store, Rules(), "real"), base_url="http://localhost") as client:
        return {path: client.get(path) for path in ("/dashboard", "/docs")}


@pytest.mark.parametrize("path", ["/dashboard", "/docs"])
def test_pages_load_nothing(answers, path):
    """No attribute that loads or runs something, no address but SVG's name, no markup made of strings."""
    text = answers[path].text
    loading = {"src", "srcset", "style", "action", "background", "data", "poster"}
    for tag, attributes in Tags(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        assert not {name for name in attributes if name in loading or name.startswith("on")}, (tag, attributes)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {"http://www.w3.org/2000/svg"}
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "localStorage",
                 "@import", "url("):  # fmt: skip
        assert word not in text, word
    assert text.isascii()


@pytest.mark.parametrize("path", ["/dashboard", "/docs"])
def test_the_policy_names_what_runs_and_no_more(answers, path):
    policy = dict(part.strip().split(" ", 1) for part in answers[path].headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in str(policy)
    assert len(re.findall("sha256-", policy["script-src"])) == (path == "/dashboard")
    assert pages.policy("<script>a</script>") != pages.policy("<script>b</script>")
    assert "script-src 'none'" in pages.policy("<p>no script</p>")


def test_docs_name_every_route(answers):
    for route in ("POST /submit", "GET /budget", "GET /experiments", "GET /experiment/{experiment_id}",
                  "POST /final_submission", "GET /final_run", "TrainingConfig", "Back end: <b>real</b>"):  # fmt: skip
        assert route in answers["/docs"].text


@pytest.fixture
def dom(tmp_path, monkeypatch):
    """The page as Chromium has it after some seconds of its own time, with ada's key given."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with_key = pages.dashboard().replace(
        "<body>", f'<body><script>sessionStorage.setItem("key", "{TEXT["ada"]}")</script>'
    )
    monkeypatch.setattr(pages, "dashboard", lambda: with_key)

    def load(url):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--enable-logging=stderr"]
        done = subprocess.run([CHROMIUM, *flags, "--dump-dom", f"{url}/dashboard"], capture_output=True, text=True)
        assert "Content Security Policy" not in done.stderr, done.stderr
        return done.stdout

    return load


def test_in_a_browser(tmp_path, dom):
    """Its script runs under the policy, shows the runs, and takes a failure's text for text."""
    store, (ada, _) = make_store(tmp_path / "store")
    with store.write() as db:
        for seed in range(3):
            ledger.submit(db, ada, parsed(model_seed=seed), time.time())
        for outcome in (Broken(2.0, HOSTILE), Done(5.0, (3.25, 2.125))):
            dispatch.ended(db, dispatch.claim(db, f"r{outcome[0]}", time.time()), outcome, time.time())
        ledger.set_final_submission(db, ada, parsed(model_seed=9), 1.875, time.time())
    with served(store) as url:
        page = dom(url)
    # of experiment 2, the newest with losses
    for text in ("simulated (surrogate)", "Experiment 2: validation loss", "2.1250", "spent <b>7</b>",
                 "reserved for queued and running <b>20</b>", "remaining <b>73</b>", "1.875"):  # fmt: skip
        assert text in page, text
    assert page.count('<circle class="dot"') == 2 and page.count("<tr tabindex") == 3
    assert "<img" not in page and "<title>Scaling laws</title>" in page and 'id="notice"><b>Simulated.' in page


def test_a_failure_is_text(tmp_path, dom):
    store, (ada, _) = make_store(tmp_path / "store")
    with store.write() as db:
        ledger.submit(db, ada, parsed(), time.time())
        dispatch.ended(db, dispatch.claim(db, "r", time.time()), Broken(2.0, HOSTILE), time.time())
    with served(store) as url:
        page = dom(url)
    assert "<dd>&lt;img src=x onerror=" in page and "<img" not in page and "taken</title>" not in page
