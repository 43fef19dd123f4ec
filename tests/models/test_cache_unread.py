"""Caches whose lengths the host does not read, as on a GPU: `used` says what it must know.

Oracle: the same calls where lengths are read. Tensors of the meta device have no values: to read one is an error.
"""

import pytest
import torch

from purelm import random, tree
from purelm.models import transformer
from purelm.models.transformer import Config, decode_, init_cache, prefill

LENGTHS = torch.tensor([3, 5, 1])
TOKENS = torch.arange(24).reshape(3, 8) % 11


def of(position):
    cfg = Config(vocab_size=11, context_length=8, d_model=8, n_layers=2, n_heads=2, window=(2, None), position=position)
    return cfg, transformer.init(random.key(0), cfg)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["level", "lengths"])
def test_what_the_caller_knows_is_enough(position, lengths):
    """Exact on a CPU; on meta shapes alone, and no value is read in the prompt's chunks and the steps after it."""
    cfg, params = of(position)
    kw = {} if lengths is None else {"lengths": lengths}
    want, read = prefill(params, TOKENS[:, :5], init_cache(cfg, 3, 8), cfg, **kw)
    got, cache = prefill(params, TOKENS[:, :5], init_cache(cfg, 3, 8), cfg, used=0, **kw)
    assert torch.equal(got, want) and all(map(torch.equal, tree.leaves(cache), tree.leaves(read)))
    there = {name: x.to("meta") for name, x in kw.items()}
    params, tokens = tree.to(params, "meta"), TOKENS.to("meta")
    got, cache = prefill(params, tokens[:, :5], init_cache(cfg, 3, 8, device="meta"), cfg, used=0, **there)
    assert got.shape == want.shape and cache.length.shape == read.length.shape
    if lengths is None:
        got, cache = prefill(params, tokens[:, 5:7], cache, cfg, used=5)
        assert got.shape == want.shape
    got, cache = decode_(params, tokens[:, 7], cache, cfg)
    assert got.shape == want.shape


def test_what_is_refused(unchecked):
    cfg, params = of("rope")
    _, cache = prefill(params, TOKENS[:, :4], init_cache(cfg, 3, 8), cfg)
    for used in (3, 5):
        with pytest.raises(
            ValueError, match=rf"used must be the number of tokens that every row has, \[4, 4, 4\], got {used}"
        ):
            prefill(params, TOKENS[:, :2], cache, cfg, used=used)
    _, uneven = prefill(params, TOKENS[:, :5], init_cache(cfg, 3, 8), cfg, lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"used must be the number of tokens that every row has, \[3, 5, 1\], got 3"):
        prefill(params, TOKENS[:, :1], uneven, cfg, used=3)
    there = tree.to(params, "meta"), TOKENS.to("meta"), init_cache(cfg, 3, 8, device="meta")
    for used in (-1, 9, 2.0, True):
        with pytest.raises(ValueError, match=rf"used must be an integer in 0..8, the cache's slots, got {used}"):
            prefill(*there, cfg, used=used)
    with pytest.raises(ValueError, match="8 tokens do not fit, 1 of 8 slots are in use"):
        prefill(*there, cfg, used=1)
    for lengths in (torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.int64), LENGTHS[:, None]):
        with pytest.raises(ValueError, match="lengths must be one integer for each of 3 rows, got"):
            prefill(*there, cfg, used=0, lengths=lengths.to("meta"))
