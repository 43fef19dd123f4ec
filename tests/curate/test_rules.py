"""Lists of rules as a step. Oracle: the rules one by one, each on a scan of its own."""

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from purelm.curate import gopher
from purelm.curate.document import Document, Drop, outcomes
from purelm.curate.rules import ALL, COURSE, ENGLISH, judged
from purelm.curate.words import scan
from tests.curate.web_texts import ENGINES, page

NOUNS = "river engine theatre number painter garden treaty market island letter doctor window".split()
VERBS = "crossed measured described remembered followed repaired bought lost painted visited explained closed".split()
# Each pair of noun and verb once: different lines, in which little repeats.
SENTENCES = [
    f"{a.title()} {i} and {b} {v} what the {a[::-1]}{v} had to {b[::-1]}{i}."
    for i, (a, b, v) in enumerate(zip(NOUNS * 4, NOUNS[1:] * 5, VERBS[5:] * 7, strict=False))
][:40]
longer = st.lists(st.sampled_from([*SENTENCES, "Menu", "3 likes", "we use cookies"]), min_size=5, max_size=30).map(
    "\n".join
)


def one_by_one(document, rules):
    for name, rule in rules.items():
        found = rule(scan(document.text, "python"))
        if isinstance(found, Drop):
            return Drop(f"{name}: {found.reason}", found.value)
        document = document._replace(text=found.text)
    return document


@given(page | longer, st.sampled_from([ENGLISH, ALL, COURSE]))
def test_one_scan_gives_what_many_do(text, rules):
    document = Document("1", text, "http://a", {"a": 1})
    for engine in ENGINES:
        assert judged(document, rules, engine) == one_by_one(document, rules)


def test_as_a_step():
    text = "\n".join(SENTENCES)
    menu = text + "\nHome | Contact"
    rules = {**ENGLISH, "mine": lambda s: Drop("line 39") if "39." in s.text else s}
    assert list(ENGLISH) == ["gopher", "repetition", "c4", "fineweb"] and list(ALL) == [*ENGLISH, "refinedweb"]
    short, mine = outcomes({"rules": partial(judged, rules=rules)}, [Document("1", "Home"), Document("2", menu)])
    assert short.drop == Drop("gopher: too few words", 1) and short.step == "rules"
    assert mine.drop == Drop("mine: line 39")
    assert judged(Document("2", menu + "\nMenu"), ENGLISH).text == menu
    document = Document("2", menu)
    assert judged(document) is document
    assert ENGLISH["gopher"].keywords == {"config": gopher.GOPHER}


def test_some_are_kept_and_some_changed():
    """What the property above is about: all three ends are reached."""
    texts = ["\n".join(SENTENCES[i : i + 9]) + end for i in range(20) for end in ("", "\nMenu", "\n{ and more")]
    found = [judged(Document("1", text)) for text in texts]
    kept = [text for text, x in zip(texts, found, strict=True) if isinstance(x, Document) and x.text == text]
    changed = [x for text, x in zip(texts, found, strict=True) if isinstance(x, Document) and x.text != text]
    assert len(kept) == len(changed) == 20 and {x.reason for x in found if isinstance(x, Drop)} == {"c4: curly bracket"}
