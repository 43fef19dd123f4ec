"""Pairs of answers. Oracles: rows written by hand; the counts of HH-RLHF's file by searching its texts."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.data import clean, last_answers, read, transcripts

HI = "\n\nHuman: Hi\n\nAssistant: Ho.\n\nHuman: Who?\n\nAssistant:"


def message(role, content):
    return {"role": role, "content": content}


def row_of(given, **options):
    (row,), _ = clean(transcripts(given), [last_answers(**options)])
    return row


def reason(given, **options):
    kept, (counts,) = clean(transcripts(given), [last_answers(**options)])
    assert not kept and counts.n_in == 1
    return next(iter(counts.removed))


def test_every_form_gives_the_same_row():
    """HH's text, whole chats, answers after a prompt in messages or as text."""
    before = [message("user", "Hi"), message("assistant", "Ho."), message("user", "Who?")]
    a, b = message("assistant", "I."), message("assistant", "You.")
    forms = [
        {"chosen": f"{HI} I.", "rejected": f"{HI} You.\n"},
        {"prompt": "Who?", "chosen": [*before, a], "rejected": [*before, b]},
        {"prompt": before, "chosen": [a], "rejected": [b]},
        {"messages": before, "chosen": "I.", "rejected": "You."},
    ]
    for form in forms:
        row = row_of(form | {"id": 7})
        assert (row["chosen"], row["rejected"], row["messages"], row["id"]) == ("I.", "You.", before, 7)
        assert row["prompt"] == "User:\nHi\n\nAssistant:\nHo.\n\nUser:\nWho?\n\nAssistant:\n"
    assert row_of(forms[0], render=lambda messages: str(len(messages)))["prompt"] == "3"
    one = row_of({"prompt": "Q: {x}\nA:", "chosen": " 1", "rejected": " 2"}, turns="one")
    assert (one["prompt"], one["chosen"], one["rejected"]) == ("Q: {x}\nA:", " 1", " 2")


def test_reasons():
    other = HI.replace("Ho.", "Hm.")
    cases = [
        ({"chosen": f"{HI} I.", "rejected": f"{other} You."}, "prompts differ"),
        ({"chosen": f"{HI} I.", "rejected": f"{HI} You.\n\nHuman: No.\n\nAssistant: Yes."}, "prompts differ"),
        ({"chosen": f"{HI} I.", "rejected": f"{HI} You.\n\nHuman: No."}, "no answer"),
        ({"chosen": f"{HI} ", "rejected": f"{HI} You."}, "empty answer"),
        ({"chosen": f"{HI} I.", "rejected": f"{HI}   I."}, "equal answers"),
        ({"chosen": [], "rejected": [], "prompt": []}, "no answer"),
    ]
    for form, wanted in cases:
        assert reason(form) == wanted
    assert reason({"chosen": f"{HI} I.", "rejected": f"{HI} You."}, turns="one") == "several turns"
    system = [message("system", "Be."), message("user", "Hi")]
    assert row_of({"prompt": system, "chosen": "I", "rejected": "You"}, turns="one")["prompt"] == "Be.\n\nHi"
    with pytest.raises(ValueError, match="turns must be any or one"):
        last_answers(turns="two")


def test_bad_lines_are_named(tmp_path):
    """File and line, packed files too; or left out and told of."""
    good = json.dumps({"chosen": f"{HI} I.", "rejected": f"{HI} You."})
    cases = [
        ('{"chosen": "no turn", "rejected": "x"}', "its 'chosen' does not begin with a turn"),
        ('{"chosen": "x"}', "its 'chosen' does not begin with a turn"),
        (json.dumps({"chosen": f"{HI} I."}), "lacks 'rejected'"),
        ('{"prompt": "x", "chosen": 1, "rejected": "y"}', "its 'chosen' is a int, not a text"),
        ('{"prompt": "x", "chosen": [1], "rejected": "y"}', "message 0 is a int, not an object"),
        ('{"prompt": 3, "chosen": "x", "rejected": "y"}', "its 'prompt' is a int"),
    ]
    for bad, message in cases:
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(f"{good}\n{bad}\n{good}\n".encode()))
        with pytest.raises(ValueError, match=r"rows\.jsonl\.gz, line 2: ") as error:
            list(read(path, transcripts))
        assert message in str(error.value)
        told = []
        rows, _ = clean(read(path, transcripts, told.append), [last_answers()])
        assert [row["source"][-6:] for row in rows] == ["line 1", "line 3"] and len(told) == 1
    path.write_bytes(gzip.compress(f"{good}\n{{\n".encode()))
    with pytest.raises(ValueError, match="line 2"):
        list(read(path, transcripts, told.append))  # no JSON: always an error


words = st.text("ab\n :", max_size=6).map(str.strip)


@given(st.lists(words.filter(bool), min_size=1, max_size=4), words.filter(bool), words.filter(bool))
def test_hh_round_trip(said, chosen, rejected):
    """Oracle: the turns that the text was written from."""
    names = ["Human", "Assistant"]
    shared = "".join(f"\n\n{names[i % 2]}: {x}" for i, x in enumerate(said))
    pair = {s: f"{shared}\n\nAssistant: {x}" for s, x in (("chosen", chosen), ("rejected", rejected))}
    if chosen == rejected:
        assert reason(pair) == "equal answers"
        return
    row = row_of(pair)
    roles = ["user", "assistant"]
    assert row["messages"] == [message(roles[i % 2], x) for i, x in enumerate(said)]
    assert (row["chosen"], row["rejected"]) == (chosen, rejected)


def test_hh_file(shared_data):
    """All of harmless-base's test file. Oracle: its texts, searched: 662 pairs of one turn, prompts by rpartition."""
    path = shared_data / "prefs/harmless-base.test.jsonl.gz"
    with gzip.open(path, "rt") as file:
        pairs = [(x["chosen"], x["rejected"]) for x in map(json.loads, file)]
    kept, (counts,) = clean(read(path, transcripts), [last_answers()])
    mark = "\n\nAssistant:"
    halves = [tuple(x.rpartition(mark) for x in pair) for pair in pairs]
    same = [(a, b) for a, b in halves if a[0].strip() == b[0].strip()]
    full = [(a, b) for a, b in same if a[2].strip() and b[2].strip()]
    assert (counts.n_in, counts.removed["prompts differ"]) == (2312, 2312 - len(same))
    assert counts.removed["empty answer"] == len(same) - len(full) > 0
    assert [(r["chosen"], r["rejected"]) for r in kept] == [
        (a[2].strip(), b[2].strip()) for a, b in full if a[2].strip() != b[2].strip()
    ]
    one, (counts,) = clean(read(path, transcripts), [last_answers(turns="one")])
    assert len(one) + counts.removed["several turns"] == len(kept)
    plain = [
        a[0].removeprefix("\n\nHuman:").strip() for a, b in full if a[0].count("\n\nHuman:") == 1 and mark not in a[0]
    ]
    assert [r["prompt"] for r in one] == plain and 600 < len(one) <= 662
    assert one[0]["source"].startswith(str(path))
