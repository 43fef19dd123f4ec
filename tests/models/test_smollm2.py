"""A real model: SmolLM2-135M-Instruct, from a .gguf file below $PURELM_MODELS, to a folder and into transformers.

Oracle: transformers on the folder that is written.
"""

import io
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from purelm import tree
from purelm.models import gguf, hf, transformer
from purelm.tokenizer import decode, encode, encode_chat, load_chat, render
from tests.programs import run_here

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' own


@pytest.fixture(scope="module")
def file():
    folder = os.environ.get("PURELM_MODELS")
    found = sorted(Path(folder).rglob("SmolLM2-135M-Instruct*.gguf")) if folder else []
    if not found:
        pytest.skip("real weights: set PURELM_MODELS to a folder that holds SmolLM2-135M-Instruct*.gguf")
    return found[0]


def test_the_same_logits_and_tokens_in_transformers(file, tmp_path):
    """fp32, logits up to 36: sums of some thousand terms in another order, through 30 layers."""
    from transformers import AutoModelForCausalLM

    params, cfg, bpe = gguf.load(file)
    assert tree.n_params(params) == 134_515_008 and cfg.tie_embeddings and cfg.rope_theta == 100_000
    hf.save(tmp_path / "smol", params, cfg, bpe)
    again, same, tokenizer = hf.load(tmp_path / "smol")
    assert same == cfg and tokenizer == bpe
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(again), tree.leaves(params), strict=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "smol", attn_implementation="eager").eval()
    ids = torch.from_numpy(encode(bpe, "The capital of France is Paris. 12 and 34 are").astype("int64"))[None]
    with torch.no_grad():
        torch.testing.assert_close(transformer.apply(params, ids, cfg), theirs(ids).logits, rtol=0, atol=2e-4)
        wanted = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    model = transformer.make(cfg)
    logits, cache = model.prefill(params, ids, model.init_cache(1, ids.shape[1] + 24))
    found = []
    for _ in range(24):
        found.append(int(logits.argmax(-1)))
        logits, cache = model.decode(params, torch.tensor(found[-1:]), cache)
    assert found[: len(wanted)] == wanted and decode(bpe, found)


def test_it_talks(file, tmp_path):
    """What the model is known to say, in a conversation by its template; and that template, its text and ids in
    transformers on the folder that is written."""
    from transformers import AutoTokenizer

    with patch("sys.stdin", io.StringIO("What is the capital of France?\nAnd of Italy?\n")):
        done = run_here("experiments.chat", file, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\nThe capital of Italy is Rome.\n"
    params, cfg, bpe = gguf.load(file)
    chat = load_chat(file)
    hf.save(tmp_path / "smol", params, cfg, bpe, chat=chat)
    assert load_chat(tmp_path / "smol") == chat
    theirs = AutoTokenizer.from_pretrained(tmp_path / "smol")
    talk = [{"role": "user", "content": "Hi, 12 \u00e9?"}, {"role": "assistant", "content": "Yes."}]
    for messages, prompt in ((talk, False), (talk[:1], True)):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert text == render(chat, messages, prompt)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert ids == encode_chat(bpe, chat, messages, prompt).tolist()
