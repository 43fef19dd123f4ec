"""Patterns of several steps: splitting, cuts, equality. Oracle: Hugging Face's pre-tokenizers, one after the other."""

import json
import pickle
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.testing import strategies as plm
from purelm.tokenizer import encode, encode_file, encode_iterable, fingerprint, make, resolve, split
from purelm.tokenizer.cuts import chunks
from purelm.tokenizer.formats.pretokenizers import pattern_from_json, pattern_to_json
from purelm.tokenizer.patterns import DEEPSEEK3, GPT2, SMOLLM, Removed, safe_at_spaces

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ALPHABET = [
    *"aBz09 .,!'/_-$+", " ", "  ", "\n", "\r\n", "\t", "'s", "12", "345", "\u0085", "\u00a0", "\u3000", "\x1c", "\x00",
    "\u00e9", "\u0301", "\u4e2d\u6587", "\u3042", "\u30fb", "\u00bd", "\u0663", "\U0001f600",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(ALPHABET) | st.characters(codec="utf-8"), max_size=40).map("".join)


def library_split(text, steps):
    """Pieces by Hugging Face's pre-tokenizers, given as JSON."""
    tokenizers = pytest.importorskip("tokenizers")
    model = {"type": "BPE", "vocab": {}, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "model": model, "normalizer": None, "post_processor": None}
    content |= {"decoder": None, "truncation": None, "padding": None}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    found = tokenizers.Tokenizer.from_str(json.dumps(content))
    return [piece for piece, _ in found.pre_tokenizer.pre_tokenize_str(text)] if text else []


def step(text, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: text}, "behavior": behavior, "invert": invert}


SEQUENCES = [
    [{"type": "Digits", "individual_digits": True}],
    [{"type": "Digits", "individual_digits": False}],
    [step(DEEPSEEK3[0]), step(DEEPSEEK3[1]), step(DEEPSEEK3[2])],
    [step("[\r\n]"), step(r"\s?\p{L}+"), step(r"\s+$"), {"type": "Digits", "individual_digits": True}],
    [step("a", kind="String"), step(" .", kind="String"), step(".", kind="String")],
    *[
        [step(regex, behavior, invert)]
        for regex in (r"\s", "a|B+", r"(?<=a)B|z|\p{N}{1,2}", r"\p{L}+|\s+(?!\S)")
        for behavior in ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext")
        for invert in (False, True)
    ],
    [step(r"\s+", "MergedWithNext"), step("[a-z]", "Removed"), step(r"\p{N}", "Contiguous", True)],
]


@pytest.mark.parametrize(
    "steps", SEQUENCES, ids=lambda steps: "+".join(str(s.get("behavior", s["type"])) for s in steps)
)
def test_splits_are_hugging_faces(steps):
    """Oracle: the library's own pre-tokenizers, on 300 random texts; also of the file written back."""
    problems = []
    pattern = pattern_from_json({"type": "Sequence", "pretokenizers": [*steps, LEVEL]}, problems)
    assert problems == []
    back = pattern_to_json(pattern)
    assert pattern_from_json(back, problems) == pattern and problems == []
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(14)))
        assert split(text, pattern) == library_split(text, steps), ascii(text)
        assert split(text, pattern) == library_split(text, back["pretokenizers"][:-1]), ascii(text)


@given(MIXED)
def test_smollm_is_its_two_steps(text):
    """Oracle: the steps, one after the other, each by `split`."""
    apart = [piece for part in split(text, r"\p{N}|[^\p{N}]+") for piece in split(part, "gpt2")]
    assert split(text, "smollm") == apart
    assert resolve((r"\p{N}", "gpt2")) == SMOLLM == resolve("smollm")


def test_what_resolve_makes_of_steps():
    """One step alone is itself, tuples in tuples are refused, known parts stay as they are; by hand."""
    assert resolve(("gpt2",)) == GPT2 and resolve(("a|b", "gpt2")) == ("a|b", GPT2)
    assert resolve((Removed("gpt2", True),)) == GPT2  # nothing lies between its matches
    assert resolve((Removed(r"\s+"),)) == (Removed(r"\s+"),)
    for wrong, message in [
        ((), "empty tuple"),
        ((("a|b",), "gpt2"), "neither a regular expression nor Removed"),
        (("gtp2", "a|b"), "'gtp2'"),
        ((Removed("a|b", 1),), "no Removed"),
        (Removed("a|b"), "give a regular expression"),
        (["a|b"], "give a regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve(wrong)


def test_which_steps_may_be_cut_at_spaces():
    """Known steps with one that ends a piece at spaces; anything else not."""
    assert safe_at_spaces(DEEPSEEK3) and safe_at_spaces("smollm") and safe_at_spaces((r"\p{N}{1,3}", "gpt2"))
    assert not safe_at_spaces((r"\p{N}{1,3}", r"\p{N}+")) and not safe_at_spaces((r"a |.", "gpt2"))
    assert not safe_at_spaces((Removed(r"\s"), "gpt2"))


@pytest.mark.parametrize("pattern", [DEEPSEEK3, (r"\p{N}+", "cl100k_v1"), ("[\r\n]", r"\p{N}{1,3}", "o200k")])
@given(text=MIXED)
def test_cuts_keep_the_pieces_of_steps(pattern, text):
    """Oracle: `split` of the whole text; cut at every safe place."""
    pattern, data = resolve(pattern), text.encode()
    parts = [data[start:end].decode() for start, end in chunks(data, 1, pattern)]
    assert [piece for part in parts for piece in split(part, pattern)] == split(text, pattern)


def test_cuts_of_steps_are_made(shared_data):
    """The rule finds cuts: a text with spaces has many chunks under DeepSeek's steps."""
    data = (shared_data / "text" / "tinyshakespeare.txt").read_bytes()[:100_000]
    assert len(list(chunks(data, 1000, DEEPSEEK3))) > 80


def test_steps_are_values(random_bpe):
    """Equality, hash, fingerprint and pickling see the steps; the fingerprint of a plain pattern is what it was."""
    plain = random_bpe(0)
    assert fingerprint(plain) == "6f3118ffabcf84c71dea9b4791edf8d940df86589b1216e29b34c7a616f6c437"
    steps = replace(plain, pattern=resolve((r"\p{N}+", "gpt2")))
    other = replace(plain, pattern=resolve((r"\p{N}+", Removed("a|b"), "gpt2")))
    assert steps == replace(plain, pattern=resolve((r"\p{N}+", GPT2))) and hash(steps) == hash(replace(steps))
    assert len({fingerprint(bpe) for bpe in (plain, steps, other)}) == 3 and steps != plain != other
    back = pickle.loads(pickle.dumps(other))
    assert back == other and fingerprint(back) == fingerprint(other) and isinstance(back.pattern[1], Removed)


@given(plm.texts(special_tokens=("<|endoftext|>",)), st.integers(1, 5))
def test_streams_of_steps(text, size):
    """Oracle: encode of the whole text."""
    bpe = make({i: bytes([i]) for i in range(256)} | {256: b" a"}, [(b" ", b"a")], ["<|endoftext|>"], DEEPSEEK3)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(encode_iterable(bpe, parts)) == encode(bpe, text).tolist()


def test_files_of_steps(random_bpe, tmp_path, monkeypatch):
    """A file in many blocks, one worker and two: the ids of the whole text; a pattern of steps has no compiled loop."""
    monkeypatch.setattr("purelm.tokenizer.blocks.BLOCK_BYTES", 64)
    rng = random.Random(1)
    text = "".join(rng.choices(ALPHABET, k=2000))
    (tmp_path / "t.txt").write_bytes(text.encode())
    bpe = random_bpe(1, pattern=DEEPSEEK3)
    for workers in (1, 2):
        tokens = encode_file(bpe, tmp_path / "t.txt", tmp_path / f"{workers}.bin", n_workers=workers)
        assert tokens.tokens.tolist() == encode(bpe, text).tolist()
    with pytest.raises(ValueError, match="no compiled splitter"):
        encode(bpe, text, engine="numba")
