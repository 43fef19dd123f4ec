"""The tokenizers of open weights. Oracle: Hugging Face's library, on files that the tests make and on real ones.

Real files: $PURELM_MODELS is a folder that holds, anywhere below it, Qwen's and DeepSeek's tokenizer.json in folders
named "qwen3" and "deepseek", and SmolLM2's gguf. What is absent is skipped by name.
"""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given

from purelm.testing import strategies as plm
from purelm.tokenizer import encode, encode_file, encode_iterable, load
from purelm.tokenizer.formats import huggingface
from purelm.tokenizer.formats.alphabet import byte_characters
from tests.tokenizer.formats.merges import random_merges

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
PARTS = ["a", "b", "c", " ", "  ", "\n", "bc", "a b", "<x>", "x>y", "\u0120a", "\u00e9", "e\u0301", "1", "23", "\u0301"]
PARTS += ["bbb", "\x04", "\u0338", ">", "\u4e2d"]


def random_file(rng):
    """The content of a tokenizer.json: steps, behaviors, normal forms, both passes of added tokens, missing bytes."""
    characters = byte_characters()
    missing = rng.choice([(), (), (4, 0xE4), (ord("c"), 0xCC)])
    vocab = {}
    for value, character in enumerate(characters):
        if value not in missing:
            vocab[character] = len(vocab)
    letters = [c for c in "ab ce123" if ord(c) not in missing]
    pool = [characters[ord(letter)] for letter in letters] + [characters[0xC3], characters[0xA9]]
    merges = random_merges(rng, vocab, pool)
    following, added = len(vocab), []
    for name in rng.sample(["ab", "b", " a", "a b", "<x>", "<x", "x>y", "  ", "\u00e9", "e\u0301"], rng.randint(0, 4)):
        token = {"content": name, "id": vocab.get(name, following), "normalized": rng.random() < 0.5}
        following += name not in vocab
        added.append(dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | token)
    regexes = [r"a|b+|\s+", r"\S+\s*", r" ?\p{L}+|\s+(?!\S)|\s+", r"ab|(?<=a)b", r"\p{N}{1,3}", r"[\r\n]"]
    behaviors = ["Isolated"] * 5 + ["Removed", "MergedWithNext", "MergedWithPrevious", "Contiguous"]
    steps = []
    for _ in range(rng.randint(0, 3)):
        pattern = {"Regex": rng.choice(regexes)} if rng.random() < 0.9 else {"String": rng.choice(["a", " ", "b."])}
        split = {"type": "Split", "pattern": pattern, "behavior": rng.choice(behaviors), "invert": rng.random() < 0.2}
        steps.append(rng.choice([split, split, {**DIGITS, "individual_digits": rng.random() < 0.5}]))
    level = {**LEVEL, "use_regex": rng.random() < 0.5}
    forms = [None, None, {"type": "NFC"}, {"type": "NFKC"}, {"type": "NFD"}]
    forms.append({"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFC"}]})
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": rng.choice(forms), "post_processor": None, "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": rng.random() < 0.5},
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_random_files(seed):
    """Ids, ids after saving, and ids of a stream equal the library's on the same file; most files are read."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(seed)
    read = 0
    for _ in range(120):
        text = json.dumps(random_file(rng))
        try:
            bpe = huggingface.from_json(text, "file")
        except ValueError as error:  # an added token whose bytes are those of an ordinary token
            assert any(part in str(error) for part in ("equal in", "a token has one id", "the vocab has it as")), error
            continue
        read += 1
        peer = tokenizers.Tokenizer.from_str(text)
        written = huggingface.to_json(bpe)
        again = tokenizers.Tokenizer.from_str(written)
        assert huggingface.from_json(written, "file") == bpe
        for _ in range(8):
            sample = "".join(rng.choices(PARTS, k=9))
            expected = peer.encode(sample).ids
            assert encode(bpe, sample).tolist() == expected, (text, sample)
            assert again.encode(sample).ids == expected, (text, written, sample)
            parts = [sample[i : i + 2] for i in range(0, len(sample), 2)]
            assert list(encode_iterable(bpe, parts)) == expected, (text, sample)
    assert read > 100


def test_published_forms_of_pre_tokenizers_have_the_compiled_loops():
    """Digits before ByteLevel, Removed with invert (as in the files of GPT-4), Sequences in Sequences; by hand."""
    from purelm.tokenizer.formats.pretokenizers import pattern_from_json
    from purelm.tokenizer.patterns import CL100K_V1, QWEN, SMOLLM, family

    def read(*steps):
        problems = []
        pattern = pattern_from_json({"type": "Sequence", "pretokenizers": list(steps)}, problems)
        assert problems == []
        return pattern

    def split(regex, behavior="Isolated", invert=False):
        return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}

    assert read(DIGITS, {**LEVEL, "use_regex": True}) == SMOLLM and family(SMOLLM)
    assert read(split(CL100K_V1, "Removed", True), LEVEL) == CL100K_V1
    assert read({"type": "Sequence", "pretokenizers": [split(QWEN)]}, LEVEL) == QWEN


# ---- Real files ----


def model_file(name: str) -> Path:
    folder = os.environ.get("PURELM_MODELS")
    if not folder:
        pytest.skip("real tokenizers: set PURELM_MODELS to a folder of models")
    found = sorted(Path(folder).rglob(name))
    if not found:
        pytest.skip(f"{name} not found below {folder}")
    return found[0]


def smollm_library(path):
    """The library's tokenizer with what the GGUF file holds, and Digits before ByteLevel."""
    gguf, tokenizers = pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    fields = gguf.GGUFReader(path).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    model = tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    peer, pre = tokenizers.Tokenizer(model), tokenizers.pre_tokenizers
    peer.pre_tokenizer = pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)])
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]
    peer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    return peer


@pytest.fixture(scope="module", params=["qwen3/tokenizer.json", "deepseek/tokenizer.json", "SmolLM2*.gguf"])
def real(request):
    """(BPE, the library's tokenizer) of a real file."""
    tokenizers = pytest.importorskip("tokenizers")
    path = model_file(request.param)
    peer = smollm_library(path) if path.suffix == ".gguf" else tokenizers.Tokenizer.from_file(str(path))
    return load(path), peer


def test_real_tokenizers_on_real_text(real, shared_data, tmp_path):
    """Whole text, in blocks, as a stream: 0 mismatches."""
    bpe, peer = real
    for name in ("tinyshakespeare.txt", "tinystories-2MiB.txt"):
        text = (shared_data / "text" / name).read_text()[:300_000]
        expected = peer.encode(text, add_special_tokens=False).ids
        assert encode(bpe, text).tolist() == expected
        assert list(encode_iterable(bpe, [text[i : i + 999] for i in range(0, len(text), 999)])) == expected
    (tmp_path / "t.txt").write_text(text)
    assert encode_file(bpe, tmp_path / "t.txt", tmp_path / "t.bin").tokens.tolist() == expected


@given(text=plm.texts(special_tokens=("<|im_end|>", "\uff5cDSML\uff5c", "e\u0301", "a  1", "<think>")))
def test_real_tokenizers_on_random_text(real, text):
    """Characters of all Unicode versions but those that the library does not know; 0 mismatches."""
    bpe, peer = real
    assert encode(bpe, text).tolist() == peer.encode(text, add_special_tokens=False).ids
