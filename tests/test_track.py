"""What a run leaves behind. Oracles: json, the PNG signature, html.parser."""

import base64
import builtins
import html.parser
import json
import math
import re

import pytest

from purelm import track

PNG = b"\x89PNG\r\n\x1a\n"


def rows():
    out = [{"step": i, "loss": 5.0 / i, "lr": 0.1, "grad_norm": 1.0} for i in range(1, 20)]
    return [*out, {"step": 10, "heldout_bits_per_byte": 0.9}, {"step": 19, "heldout_bits_per_byte": 0.8}]


def test_rows_survive_and_nan_is_kept(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    sink = track.jsonl_sink(path)
    sink({"step": 1, "loss": 2.5})
    sink({"step": 2, "loss": math.nan})
    sink({"step": 3, "loss": math.inf})
    assert all(json.loads(line) for line in path.read_text().splitlines())  # plain JSON, no NaN literal
    got = track.read_rows(path)
    assert got[0] == {"step": 1, "loss": 2.5}
    assert math.isnan(got[1]["loss"]) and math.isnan(got[2]["loss"])
    assert track.read_rows(tmp_path / "absent") == []


def test_a_last_line_cut_by_a_kill_is_left_out_and_other_damage_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert track.read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not JSON"):
        track.read_rows(path)


def test_truncate_drops_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = track.jsonl_sink(path)
    for step in range(1, 6):
        sink({"step": step, "loss": math.nan if step == 2 else 1.0})
    track.truncate_rows(path, 3)
    assert [r["step"] for r in track.read_rows(path)] == [1, 2, 3]
    assert math.isnan(track.read_rows(path)[1]["loss"])
    track.truncate_rows(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


def test_curves_with_all_some_or_no_rows(tmp_path):
    for name, given in (("all", rows()), ("one", rows()[:1]), ("none", [])):
        track.plot_curves(given, tmp_path / f"{name}.png", floor=0.7)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "none.png").stat().st_size


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.urls, self.depth = [], 0

    def handle_starttag(self, tag, attrs):
        self.urls += [value for name, value in attrs if name in ("src", "href")]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def hide(module, *args, **kwargs):
        if module.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install 'purelm\[report\]'"):
        track.plot_curves(rows(), tmp_path / "curves.png")


def test_report_is_one_file_that_needs_no_network_and_escapes_text(tmp_path):
    track.plot_curves(rows(), tmp_path / "curves.png")
    path = tmp_path / "report.html"
    track.write_report(
        path,
        title="run <1>",
        summary={"loss": 0.123456789, "steps": 12345, "seconds": 3},
        config={"model": {"d_model": 64}, "prompt": "<script>alert(1)</script>"},
        curves=tmp_path / "curves.png",
        samples=[("Once & <b>", "upon </pre><script>evil()</script>")],
    )
    text = path.read_text()
    links = Links()
    links.feed(text)
    assert len(links.urls) == 1 and links.urls[0].startswith("data:image/png;base64,")
    assert base64.b64decode(links.urls[0].split(",", 1)[1]) == (tmp_path / "curves.png").read_bytes()
    assert "<script" not in text and not re.search(r"https?://", text)
    assert "0.1235" in text and "12,345" in text and "model.d_model" in text


def test_write_json_replaces_whole(tmp_path):
    path = tmp_path / "a" / "config.json"
    track.write_json(path, {"x": 1})
    track.write_json(path, {"x": tmp_path})
    assert json.loads(path.read_text()) == {"x": str(tmp_path)}
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_panels_of_another_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match="panels: 1 are given, and four are drawn"):
        track.plot_curves(rows(), tmp_path / "curves.png", panels=[("loss", "loss")])
