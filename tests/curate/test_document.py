"""Steps and counts. Oracles: by hand; counts of parts, merged, are those of the whole."""

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from purelm.curate.document import Counts, Document, Drop, Outcome, counted, merged, outcomes

STEPS = {
    "short": lambda d: d if len(d.text) > 2 else Drop("too short", len(d.text)),
    "upper": lambda d: d._replace(text=d.text.upper()).noted(upper=True),
    "letters": lambda d: Drop("has X") if "X" in d.text else d,
}


def test_documents_go_through_the_steps_in_order():
    given_ = [Document("1", "abc"), Document("2", "ab"), Document("3", "axe", meta={"a": 1})]
    kept, short, x = outcomes(STEPS, given_)
    assert kept == Outcome(Document("1", "ABC", meta={"upper": True}))
    assert short == Outcome(Document("2", "ab"), "short", Drop("too short", 2))
    assert x == Outcome(Document("3", "AXE", meta={"a": 1, "upper": True}), "letters", Drop("has X"))
    assert given_[2].meta == {"a": 1}
    assert [o.drop for o in outcomes({}, given_)] == [None] * 3


def counts_of(texts):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    found = zip(documents, outcomes(STEPS, documents), strict=True)
    return reduce(lambda c, x: counted(c, x[1], len(x[0].text)), found, Counts())


@given(st.lists(st.text("abxX ", max_size=5), max_size=12), st.integers(0, 12))
def test_counts_add_up(texts, cut):
    """Exact, for any cut; and by hand: what is kept and dropped is all."""
    whole = counts_of(texts)
    assert merged(counts_of(texts[:cut]), counts_of(texts[cut:])) == whole
    assert whole.documents == len(texts) and whole.characters == sum(map(len, texts))
    assert whole.kept + sum(whole.dropped.values()) == whole.documents
    assert whole.dropped.get(("short", "too short"), 0) == sum(len(t) <= 2 for t in texts)
    assert whole.kept_characters == sum(len(t) for t in texts if len(t) > 2 and "X" not in t.upper())
