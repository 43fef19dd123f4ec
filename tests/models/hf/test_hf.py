"""Open weights, read and written. Oracle: transformers' own classes, on small models with every parameter random."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from purelm import generate, random, tree
from purelm.models import hf, transformer
from purelm.models.hf.families import FAMILIES
from tests.models.hf.small import MODELS, made

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and huggingface_hub's own
IDS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """(name, transformers' model, its folder)."""
    model, path = made(request.param), tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    return request.param, model, path


def test_logits_and_gradients(folder):
    """fp32, logits of size 3: sums of some hundred terms in another order. Gradients of the mean loss, to 1e-4."""
    _, model, path = folder
    params, cfg = hf.load_weights(path)
    wanted = model(IDS, labels=IDS)
    assert all(x.dtype == torch.float32 for x in tree.leaves(params))
    torch.testing.assert_close(transformer.apply(params, IDS, cfg), wanted.logits, rtol=0, atol=1e-5)
    leaves, form = tree.flatten(params)
    leaves = [x.requires_grad_() for x in leaves]
    batch = {"tokens": IDS[:, :-1], "targets": IDS[:, 1:]}
    loss, _ = transformer.loss(tree.unflatten(form, leaves), batch, cfg)
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-5, atol=1e-5)
    grads = dict(zip(tree.paths(params), torch.autograd.grad(loss, leaves), strict=True))
    model.zero_grad()
    wanted.loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    compared = 0
    for name, tensors in hf.stored_by(FAMILIES[model.config.model_type], cfg).items():
        if name in theirs:  # a tied head is no parameter of its own there
            x = torch.cat([grads[p] for p in tensors.paths])
            torch.testing.assert_close(x.T if tensors.transposed else x, theirs[name], rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == len(theirs)


def test_rows_longer_than_the_trained_length(tmp_path):
    """dynamic_ntk alone changes beyond it."""
    model = made("llama, dynamic")
    model.save_pretrained(tmp_path)
    params, cfg = hf.load_weights(tmp_path)
    long = torch.randint(0, 61, (1, 150), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(transformer.apply(params, long, cfg), model(long).logits, rtol=0, atol=1e-5)
    unscaled = transformer.apply(params, long, dataclasses.replace(cfg, rope_scaling=None))
    assert not torch.allclose(unscaled, model(long).logits, rtol=0, atol=1e-3)


def test_64_greedy_tokens(folder):
    """Equal ids, also beyond the window; the cache is ours."""
    _, model, path = folder
    params, cfg = hf.load_weights(path)
    prompt, n = IDS[:1, :10], 64
    wanted = model.generate(prompt, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 10:]
    model_ = transformer.make(cfg)
    cache = model_.init_cache(1, 10 + n)
    logits, cache = model_.prefill(params, prompt, cache)
    found = []
    for _ in range(n):
        found.append(int(logits.argmax(-1)))
        logits, cache = model_.decode(params, torch.tensor(found[-1:]), cache)
    assert found == wanted.tolist()


def test_a_saved_folder_is_the_same_model_there(folder, tmp_path):
    """Every bit of the logits, and no tensor that transformers misses or does not know."""
    _, model, path = folder
    params, cfg = hf.load_weights(path)
    kind = model.config.model_type
    hf.save(tmp_path / "saved", params, cfg, model_type=kind)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    back, same = hf.load_weights(tmp_path / "saved")
    assert same == cfg and tree.paths(back) == tree.paths(params)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(back), tree.leaves(params), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_several_files(tmp_path, dtype):
    """Oracle: the file's own tensors, read by safetensors; files of at most 8 kB each."""
    model = made("gpt2")
    model.save_pretrained(tmp_path / "one")
    params, cfg = hf.load_weights(tmp_path / "one", dtype=dtype)
    assert {x.dtype for x in tree.leaves(params)} == {dtype}
    hf.save(tmp_path / "two", params, cfg, max_shard_bytes=8192)
    names = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert names[0] == "config.json" and names[-1] == "model.safetensors.index.json" and len(names) > 5
    again, _ = hf.load_weights(tmp_path / "two")
    stored = {}
    for name in names[1:-1]:
        assert (tmp_path / "two" / name).stat().st_size < 8192 + 4096
        stored |= load_file(tmp_path / "two" / name)
    theirs = model.state_dict()
    assert {*stored} == {*theirs} - {"lm_head.weight"}
    for name, x in stored.items():
        assert torch.equal(x, theirs[name].to(dtype)), name
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(params), tree.leaves(again), strict=True))
    assert json.loads((tmp_path / "two/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_parameters_own_their_memory(tmp_path):
    """The file may change or go; nothing that is read is a view of something larger."""
    made("gpt2").save_pretrained(tmp_path)
    params, _ = hf.load_weights(tmp_path)
    before = tree.map(torch.clone, params)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(before), tree.leaves(params), strict=True))
    assert all(x.untyped_storage().nbytes() == x.nbytes and x.is_contiguous() for x in tree.leaves(params))


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)


def test_older_files_of_gpt2(tmp_path):
    """Without the prefix, with masks as buffers, and with the tied head as a tensor of its own."""
    model = made("gpt2")
    model.save_pretrained(tmp_path)

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 80, 80)
        tensors["lm_head.weight"] = tensors["wte.weight"]

    rewrite(tmp_path, older)
    params, cfg = hf.load_weights(tmp_path)
    torch.testing.assert_close(transformer.apply(params, IDS, cfg), model(IDS).logits, rtol=0, atol=1e-5)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"has lm_head\.weight, unknown to model_type gpt2"):
        hf.load_weights(tmp_path)


def test_any_layout_of_rope_is_written_as_halves(tmp_path):
    """A model of our own, with interleaved features, norms of heads and biases' rows in that order, too."""
    cfg = transformer.Config(61, 64, 32, 2, 4, n_kv_heads=2, head_dim=8, d_ff=48, qk_norm="head", norm_eps=1e-6)
    for options in ({}, dict(qk_norm="none", biases="qkv"), dict(qk_norm="full", norm_position="output")):
        config = dataclasses.replace(cfg, **options)
        params = transformer.init(random.key(0), config)
        params = tree.map_with_path(
            lambda p, x: x + 0.3 * random.normal(random.key(len(p)), tuple(x.shape)) if x.ndim == 1 else x, params
        )
        wanted = transformer.apply(params, IDS, config)
        folder = tmp_path / f"{len(options)}{options.get('qk_norm')}"
        hf.save(folder, params, config)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(IDS).logits, wanted, rtol=0, atol=1e-5)
        halves, other = hf.with_layout(params, config, "half")
        back, same = hf.with_layout(halves, other, "interleaved")
        assert same == config
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(back), tree.leaves(params), strict=True))


def config_of(folder, **changes):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


CONFIGS = {
    "architecture": (dict(model_type="mamba"), "model_type 'mamba' is not supported; supported are llama, mistral, "),
    "activation": (dict(hidden_act="gelu"), "hidden_act 'gelu': not supported for model_type llama"),
    "several": (dict(mlp_bias=True, attention_bias=True), "attention_bias True, mlp_bias True: not supported"),
    "unknown": (
        dict(residual_multiplier=2.0, logits_scaling=8.0), "logits_scaling, residual_multiplier: not known for model_t"
    ),
    "missing": (dict(hidden_size="absent", vocab_size="absent"), "lacks hidden_size, vocab_size"),
    "rope": (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "rope_type 'longrope' is not supported"),
    "rope option": (
        dict(rope_parameters=dict(rope_type="yarn", factor=2.0, mscale=0.7)), "mscale: not supported for rope_type yarn"
    ),
    "rope factor": (dict(rope_parameters=dict(rope_type="linear")), "lacks the factor of rope_type linear"),
    "heads": (dict(num_attention_heads=5, head_dim=None), "Config.n_heads must divide d_model 32"),
    "type": (dict(num_hidden_layers="3"), "num_hidden_layers '3': not a positive integer"),
    "layers": (dict(num_hidden_layers=2), r"has model.layers.2.input_layernorm.weight, .* unknown to model_type llama"),
    "more layers": (dict(num_hidden_layers=4), r"lacks model.layers.3.input_layernorm.weight, "),
    "shape": (dict(intermediate_size=40), r"mlp.gate_proj.weight has shape \(48, 32\), and the config says \(40, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_not_supported_is_named(tmp_path, case):
    made("llama").save_pretrained(tmp_path)
    changes, message = CONFIGS[case]
    config_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        hf.load_weights(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_unknown_fields_can_be_passed_over(tmp_path):
    made("llama").save_pretrained(tmp_path)
    config_of(tmp_path, my_note="x")
    with pytest.raises(ValueError, match=r"my_note: not known .* ignore=\[...\] passes over"):
        hf.load_weights(tmp_path)
    hf.load_weights(tmp_path, ignore=["my_note"])


def broken(path, kind):
    file = path / "model.safetensors"
    data = file.read_bytes()
    if kind == "short":
        file.write_bytes(data[:-100])
    elif kind == "header":
        file.write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])
    elif kind == "integers":
        rewrite(path, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}))
    elif kind == "absent":
        file.rename(path / "pytorch_model.bin")
    elif kind == "index":
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    elif kind == "no index":
        (path / "model.safetensors.index.json").write_text("[1]")
    elif kind == "gone":
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    elif kind == "config":
        (path / "config.json").write_text("{")
    elif kind == "no config":
        (path / "config.json").unlink()


BROKEN = {
    "short": "model.safetensors: not a safetensors file, or cut short",
    "header": "model.safetensors: not a safetensors file, or cut short",
    "integers": "model.norm.weight is I32; supported are F64, F32, F16, BF16",
    "absent": "has neither model.safetensors nor model.safetensors.index.json; it has pytorch_model.bin",
    "index": r"names files outside of its folder: \['../secret.safetensors'\]",
    "no index": "not an index of safetensors files",
    "gone": "a.safetensors: no such file",
    "config": "config.json: not JSON",
    "no config": "has no config.json",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders(tmp_path, kind):
    made("llama").save_pretrained(tmp_path)
    broken(tmp_path, kind)
    with pytest.raises(ValueError, match=BROKEN[kind]):
        hf.load_weights(tmp_path)


def test_nothing_is_downloaded_and_nothing_overwritten(tmp_path):
    with pytest.raises(ValueError, match="HuggingFaceTB/SmolLM2-135M: no such folder; nothing is downloaded here"):
        hf.load("HuggingFaceTB/SmolLM2-135M")
    cfg = transformer.Config(61, 64, 32, 2, 4)
    params = transformer.init(random.key(0), cfg)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        hf.save(tmp_path / "full", params, cfg)
    odd = dataclasses.replace(cfg, ffn="relu2")
    with pytest.raises(ValueError, match=r"cfg has no form as a config\.json: llama has no form for ffn is 'relu2'; "):
        hf.save(tmp_path / "new", transformer.init(random.key(0), odd), odd)
    with pytest.raises(ValueError, match=r"params lack layers\.0\.ffn\.w3\.weight"):
        hf.save(tmp_path / "new", transformer.init(random.key(0), odd), cfg)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_generation_of_several_rows(tmp_path):
    """Greedy, prompts of different lengths, two at a time: the ids of each prompt alone in transformers."""
    model = made("olmo3")
    model.save_pretrained(tmp_path)
    params, cfg = hf.load_weights(tmp_path)
    prompts = [IDS[:1, :n] for n in (3, 11, 7)]
    wanted = [model.generate(p, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0) for p in prompts]
    greedy = generate.Sampling(temperature=0.0)
    out = generate.generate(
        transformer.make(cfg), params, [p[0] for p in prompts], random.key(0), max_new_tokens=9, sampling=greedy,
        batch_size=2,
    )  # fmt: skip
    for prompt, ids, theirs in zip(prompts, out.tokens, wanted, strict=True):
        assert ids.tolist() == theirs[0, prompt.shape[1] :].tolist()
