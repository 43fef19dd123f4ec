"""The rules beside datatrove's filters, where datatrove is installed. Oracle: its verdicts and reasons.

pip install --target FOLDER datatrove, and FOLDER on PYTHONPATH. Words and sentences are ours there too, because spaCy's
tokens differ; and the texts have no white space at the ends of lines and no blank lines but between paragraphs, about
which the two differ on purpose. No word is the beginning of another, so joined words are one n-gram only.
"""

import random
from dataclasses import replace

import pytest

from purelm.curate import c4, fineweb, gopher, repetition
from purelm.curate.document import Drop
from purelm.curate.words import scan
from tests.curate.test_words import slow_row

pytest.importorskip("datatrove")

COMMON = "the of a page Cat's ran, home. why? ... - # 3 1,000 (x) javascript { \u2022 \xe9t\xe9! \u4e2d\u3002".split()
COMMON += ["Lorem ipsum"]
RARE = [f"word{i}ing." for i in range(300)]


def texts(line_end):
    """Pages of lines that repeat now and then, from nearly empty to some hundred words."""
    draw = random.Random(0)
    for _ in range(600):
        pool = draw.choice([COMMON[:12], COMMON + RARE[:50], [*RARE, "the", "of"], RARE + COMMON[:9]])
        often = draw.choice([0.0, 0.02, 0.3])
        lines: list[str] = []
        for _ in range(draw.randint(1, 25)):
            again = lines and draw.random() < often
            lines.append(draw.choice(lines) if again else " ".join(draw.choices(pool, k=draw.randint(1, 12))))
        yield "".join(line + draw.choice(line_end) for line in lines).rstrip("\n")


def compare(theirs, rule, reasons, line_end=("\n",)):
    """Verdict, reason and text are equal; every reason occurs, and some texts are kept."""
    from datatrove.data import Document

    seen = set()
    for text in texts(line_end):
        document = Document(text=text, id="1")
        found = theirs.filter(document)
        kept, reason = (found, None) if isinstance(found, bool) else found
        ours = rule(scan(text))
        assert (ours.reason if isinstance(ours, Drop) else None) == (None if kept else reasons[reason]), text
        assert not kept or ours.text == document.text
        seen.add(reason)
    assert seen == {None, *reasons}


def ours_in(monkeypatch, module):
    monkeypatch.setattr(module, "split_into_words", lambda text, language: text.split())


def test_gopher_quality(monkeypatch):
    """Without stop words, which are whole tokens there; the limits such that each rule drops a text."""
    from datatrove.pipeline.filters import gopher_quality_filter as module

    ours_in(monkeypatch, module)
    theirs = module.GopherQualityFilter(
        min_doc_words=10, max_doc_words=150, min_avg_word_length=4, max_avg_word_length=9.5, max_symbol_word_ratio=0.08,
        max_bullet_lines_ratio=0.4, max_ellipsis_lines_ratio=0.1, max_non_alpha_words_ratio=0.8, min_stop_words=0,
    )  # fmt: skip
    config = gopher.Quality(10, 150, 4, 9.5, 0.08, 0.08, 0.4, 0.1, 0.8, None)
    reasons = {
        "gopher_short_doc": "too few words",
        "gopher_long_doc": "too many words",
        "gopher_below_avg_threshold": "short words",
        "gopher_above_avg_threshold": "long words",
        "gopher_too_many_hashes": "hashes",
        "gopher_too_many_ellipsis": "ellipses",
        "gopher_too_many_bullets": "bullet lines",
        "gopher_too_many_end_ellipsis": "ellipsis lines",
        "gopher_below_alpha_threshold": "words without letters",
    }
    compare(theirs, lambda s: gopher.quality(s, config), reasons)


def test_repetition(monkeypatch):
    from datatrove.pipeline.filters import gopher_repetition_filter as module

    ours_in(monkeypatch, module)
    config = replace(
        repetition.GOPHER,
        paragraphs=0.4,
        paragraph_characters=0.1,
        top_ngrams=((2, 0.2), (3, 0.1)),
        duplicate_ngrams=((2, 0.25), (3, 0.15), (5, 0.12), (10, 0.05)),
    )
    theirs = module.GopherRepetitionFilter(
        0.3, 0.4, 0.2, 0.1, top_n_grams=config.top_ngrams, dup_n_grams=config.duplicate_ngrams
    )
    reasons = {
        "dup_para_frac": "duplicate paragraphs",
        "dup_para_char_frac": "duplicate paragraph characters",
        "dup_line_frac": "duplicate lines",
        "dup_line_char_frac": "duplicate line characters",
        **{f"top_{n}_gram": f"top {n}-gram characters" for n, _ in config.top_ngrams},
        **{f"duplicated_{n}_n_grams": f"duplicate {n}-gram characters" for n, _ in config.duplicate_ngrams},
    }
    compare(theirs, lambda s: repetition.repetition(s, config), reasons, ("\n", "\n\n"))


def test_fineweb(monkeypatch):
    from datatrove.pipeline.filters import fineweb_quality_filter as module

    ours_in(monkeypatch, module)
    reasons = {
        "line_punct_ratio": "lines without punctuation",
        "short_line_ratio": "short lines",
        "char_dup_ratio": "duplicate line characters",
        "list_ratio": "newlines",
    }
    config = replace(fineweb.FINEWEB, most_newlines=0.2, least_punctuated=0.3)
    theirs = module.FineWebQualityFilter(new_line_ratio=0.2, line_punct_thr=0.3)
    compare(theirs, lambda s: fineweb.quality(s, config), reasons)


@pytest.mark.parametrize("config", [c4.C4, c4.FINEWEB])
def test_c4(monkeypatch, config):
    from datatrove.pipeline.filters import c4_filters as module

    monkeypatch.setattr(module, "split_into_sentences", lambda line, language: range(slow_row(line)[5]))
    theirs = module.C4QualityFilter(filter_no_terminal_punct=config.terminal_punctuation)
    reasons = {"lorem_ipsum": "lorem ipsum", "curly_bracket": "curly bracket", "too_few_sentences": "too few sentences"}
    compare(theirs, lambda s: c4.clean(s, config), reasons, ("\n", "\n\n"))
