"""tokenizer.json files of others: equal ids or a refusal by name. Oracle: Hugging Face's library."""

import json
import random

import pytest

from purelm.tokenizer import encode, load, save
from purelm.tokenizer.formats import added_around, huggingface
from purelm.tokenizer.formats.alphabet import byte_characters
from tests.tokenizer.formats.merges import random_merges
from tests.tokenizer.formats.test_formats import same

BYTES = {value: bytes([value]) for value in range(256)}
TEXTS = [
    "the cat's hat sat on the mat, the THAT'S  that\n\n at 12345 ",
    "caf\u00e9 \u4e2d\u6587 the\u0301 \U0001f600\U0001f600 <|endoftext|>then <|pad|> the\t the \u017f'\u017f end   ",
    "'ll we'LL  \r\n x//\n\n  y",
]


def huggingface_file(bpe, path, change):
    """The file of `bpe` after change(content)."""
    save(bpe, path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_old_forms_of_tokenizer_json_are_read(trained, tmp_path):
    """Merges as "a b", a file without the newer keys, added tokens that are not marked special."""
    bpe = trained()

    def older(content):
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        del content["model"]["ignore_merges"], content["model"]["type"], content["pre_tokenizer"]["use_regex"]
        content["added_tokens"][0]["special"] = False
        content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}

    assert same(load(huggingface_file(bpe, tmp_path / "t.json", older)), bpe)


def _set(*keys):
    """A change of a file's content: the last argument goes to the place that the others name."""

    def change(content):
        for key in keys[:-2]:
            content = content[key]
        content[keys[-2]] = keys[-1]

    return change


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "a|."}, "behavior": "Isolated", "invert": False}


BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|pad|>"}}, {"Sequence": {"id": "A"}}]}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def _append(token):
    return lambda content: content["added_tokens"].append(FLAGS | token)


def _sequence(*steps):
    return _set("pre_tokenizer", {"type": "Sequence", "pretokenizers": list(steps)})


@pytest.mark.parametrize(
    "change, message",
    [
        (_set("model", "type", "Unigram"), "the model is Unigram; only BPE"),
        (_set("model", "vocab", []), "the model is BPE; only BPE"),
        (_set("model", 3), "not a tokenizer.json"),
        (_set("model", "dropout", 0.1), "model.dropout is 0.1"),
        (_set("model", "byte_fallback", True), "model.byte_fallback"),
        (_set("model", "end_of_word_suffix", "</w>"), "model.end_of_word_suffix"),
        (_set("normalizer", {"type": "Lowercase"}), "the normalizer Lowercase changes the text; supported are NFC"),
        (_set("normalizer", {"type": "NFC", "left": 1}), "the normalizer NFC has left 1, which is not known"),
        (_set("normalizer", 3), "the normalizer damaged"),
        (_set("pre_tokenizer", None), r"the pre-tokenizer is \[None\]"),
        (_set("pre_tokenizer", {"type": "Metaspace"}), "Metaspace.*supported are ByteLevel"),
        (_set("pre_tokenizer", "add_prefix_space", True), "add_prefix_space"),
        (_sequence({**SPLIT, "behavior": "Dropped"}, BYTE_LEVEL), "behavior 'Dropped'"),
        (_sequence({**SPLIT, "invert": 1}, BYTE_LEVEL), "invert 1"),
        (_sequence({**SPLIT, "pattern": {"String": ""}}, BYTE_LEVEL), "can match no characters"),
        (_sequence({**SPLIT, "pattern": {"Glob": "a"}}, BYTE_LEVEL), "supported are a Regex and a String"),
        (_sequence({**SPLIT, "flags": 3}, BYTE_LEVEL), "the pre-tokenizer Split has flags 3, which is not known"),
        (_sequence(BYTE_LEVEL, SPLIT), "Split after ByteLevel"),
        (_set("model", "cache", 3), "model.cache is not known"),
        (_sequence({**SPLIT, "pattern": {"Regex": "("}}, BYTE_LEVEL), r"a group without \)"),
        (_sequence({**SPLIT, "pattern": {"Regex": r"\p{L}+$"}}, BYTE_LEVEL), r"Split: \$ at character 6 of"),
        (_sequence({**SPLIT, "pattern": {"Regex": "(?:a{900}){900}"}}, BYTE_LEVEL), "810,000 times in all"),
        (_set("truncation", {"max_length": 5}), "has truncation, .*text_only=True"),
        (_set("padding", {"pad_id": 0}), "has padding, .*text_only=True"),
        (_set("post_processor", BOS), "the post-processor TemplateProcessing adds tokens .*text_only=True"),
        (_set("post_processor", {"type": "Sequence", "processors": [BYTE_LEVEL, BOS]}), "the post-processor Sequence"),
        (_set("added_tokens", {"<a>": 3}), "added_tokens is dict"),
        (_set("added_tokens", 0, "id", True), "no content or no id"),
        (_set("added_tokens", 0, "id", 1.0), "no content or no id"),
        (_set("added_tokens", 0, "content", ""), "no content or no id"),
        (_append({"content": "\ud800", "id": 302}), "lone surrogate"),
        (_append({"content": "<new>", "id": 303}), "id 303, but .* gives it 302, the next"),
        (_sequence({**SPLIT, "pattern": {"Regex": r"\d{1,3}+|."}}, BYTE_LEVEL), "possessive interval"),
        (_sequence({"type": "Punctuation"}, BYTE_LEVEL), "Punctuation"),
        (_set("added_tokens", 0, "lstrip", True), "'<.endoftext.>' has lstrip"),
        (_set("added_tokens", 0, "single_word", True), "single_word"),
        (_set("added_tokens", 0, {"id": 0}), "no content or no id"),
        (_set("added_tokens", 1, "content", "<|endoftext|>"), "there twice"),
        (_set("added_tokens", 0, "id", 77), "to have id 77"),
        (_set("model", "merges", 0, "a b c"), r"model.merges\[0\] is 'a b c', not two tokens"),
        (_set("model", "merges", 0, ["a"]), r"model.merges\[0\]"),
        (_set("model", "merges", 0, ["a", "\u4e2d"]), r"model.merges\[0\].*stands for no byte"),
        (_set("model", "merges", 0, ["zz", "z"]), "the left part of merge 0"),
        (_set("model", "vocab", "a", "x"), "the id of 'a' is 'x'"),
        (_set("model", "vocab", "a", 5), "both have id 5"),
        (_set("model", "vocab", "\u4e2d", 9999), "stands for no byte"),
    ],
)
def test_what_would_change_ids_is_refused(trained, tmp_path, change, message):
    """Each unsupported or damaged part gives one line that begins with the file's name."""
    path = huggingface_file(trained(), tmp_path / "t.json", change)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_all_that_is_refused_is_named_at_once(trained, tmp_path):
    """One line names each key; oracle: the changes."""

    def change(content):
        content["model"] |= {"dropout": 0.5, "byte_fallback": True}
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}
        content["pre_tokenizer"]["add_prefix_space"] = True
        content["added_tokens"][1] |= {"lstrip": True, "rstrip": True}
        content["truncation"] = {"max_length": 3}

    with pytest.raises(ValueError) as caught:
        load(huggingface_file(trained(), tmp_path / "t.json", change))
    for part in ("dropout", "byte_fallback", "normalizer Strip", "add_prefix_space", "lstrip", "rstrip", "truncation"):
        assert part in str(caught.value), part
    assert "\n" not in str(caught.value)


def test_text_only_leaves_out_what_comes_after_encoding(trained, tmp_path):
    """Oracle: Hugging Face's encode(add_special_tokens=False) of a file with a begin-of-text token."""
    tokenizers = pytest.importorskip("tokenizers")

    def change(content):
        special = {"id": "<|pad|>", "ids": [399], "tokens": ["<|pad|>"]}
        single = [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "special_tokens": {"<|pad|>": special},
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        }  # fmt: skip

    bpe = trained()
    path = huggingface_file(bpe, tmp_path / "t.json", change)
    peer = tokenizers.Tokenizer.from_file(str(path))
    with pytest.raises(ValueError, match="adds tokens around a text"):
        load(path)
    assert added_around(path) == ((399,), ()) and added_around(tmp_path / "t.json") == ((399,), ())
    for text in TEXTS:
        assert peer.encode(text).ids == [399, *encode(bpe, text).tolist()]
        assert peer.encode(text, add_special_tokens=False).ids == encode(load(path, text_only=True), text).tolist()


def test_random_files_give_hugging_faces_ids_or_are_refused():
    """Oracle: the library on the same file. Random merges, ids, added tokens that overlap, flags, splits."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    read = 0
    for _ in range(250):
        text = json.dumps(random_file(rng))
        try:
            bpe = huggingface.from_json(text, "file")
        except ValueError:
            continue
        read += 1
        peer = tokenizers.Tokenizer.from_str(text)
        for _ in range(6):
            parts = ["a", "b", "c", " ", "bc", "a b", "<x>", "x>y", "\u0120a", "\u00e9", "bbb"]
            sample = "".join(rng.choices(parts, k=7))
            assert encode(bpe, sample, engine="python").tolist() == peer.encode(sample).ids, (text, sample)
    assert read > 60


def random_file(rng):
    """The content of a tokenizer.json; about half of them are such as we refuse."""
    characters = byte_characters()
    vocab = {character: value for value, character in enumerate(characters)}
    pool = [characters[ord(letter)] for letter in "ab c"]
    merges = random_merges(rng, vocab, pool)
    following, added = len(vocab), []
    mixed = rng.random() < 0.3
    for name in rng.sample(["ab", "b", "bc", " a", "a b", "<x>", "<x", "x>y", "bb", "  "], rng.randint(0, 3)):
        token_id = vocab.get(name, following)
        following += name not in vocab
        wrong = rng.random() < 0.05
        added.append(FLAGS | {"content": name, "id": token_id + wrong, "normalized": mixed and rng.random() < 0.5})
    if added and rng.random() < 0.1:
        added[0][rng.choice(["lstrip", "rstrip", "single_word"])] = True
    level = {"type": "ByteLevel", "add_prefix_space": rng.random() < 0.05, "trim_offsets": True, "use_regex": True}
    regexes = [r"a|b+|\s+", r"\S+\s*", r" ?\p{L}+|\s+(?!\S)|\s+", r"ab|(?<=a)b", r"(?=b)", r"\S+$|\s", r"\w+"]
    split = {
        "type": "Split", "pattern": {"Regex": rng.choice(regexes)}, "invert": rng.random() < 0.1,
        "behavior": rng.choice(["Isolated"] * 4 + ["Removed", "MergedWithNext", "Contiguous"]),
    }  # fmt: skip
    plain = {**level, "use_regex": rng.random() < 0.1}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": rng.choice([level, plain, {"type": "Sequence", "pretokenizers": [split, plain]}]),
        "post_processor": rng.choice([None, None, level]), "decoder": level,
        "model": {
            "type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": rng.random() < 0.5,
            "dropout": rng.choice([None, None, None, 0.0, 0.5]), "unk_token": rng.choice([None, "a"]), "fuse_unk": True,
        },
    }  # fmt: skip


def test_hostile_json(tmp_path):
    """Depth and numbers that Python's reader gives up on are one line; oracle: the text of the error."""
    for text, message in [("[" * 100_000, "nested too deeply"), ('{"model": ' + "9" * 5000 + "}", "integer string")]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
            load(tmp_path)


def test_patterns_that_the_library_reads_differently_are_not_saved(trained, tmp_path):
    """The file on disk stays what it was; .tiktoken, which holds no pattern, takes them."""
    save(trained(), tmp_path / "t.json")
    before = (tmp_path / "t.json").read_bytes()
    with pytest.raises(ValueError, match=r"bpe.pattern cannot be saved in a tokenizer.json: \\w at character 0"):
        save(trained(r"\w+|\W+"), tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == before
    save(trained(r"\w+|\W+"), tmp_path / "t.tiktoken")
