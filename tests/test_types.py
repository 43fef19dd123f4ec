"""What a type checker says of a program that swaps parts: nothing of a right one, each line of a wrong one.

Oracle: mypy, on two programs; in the wrong one `# wrong` marks the lines to be reported.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from purelm.models import config

ROOT = Path(__file__).resolve().parents[1]

RIGHT = """
from torch import Tensor
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.models.feed_forward import gated
from purelm.ops import REFERENCE, Ops
from purelm.ops.masks import Segments, Window
from purelm.ops.protocols import Attention
from purelm.ops.sdpa import sdpa_attention
from purelm.train import Loss
from purelm.transforms import remat

def mine(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: Window = None, segment_ids: Segments = None,
    scale: float | None = None, softcap: float | None = None, more: int = 0,
) -> Tensor:
    return q

attention: Attention = mine
attention = sdpa_attention
ops: Ops = REFERENCE._replace(attention=mine, relu2=lambda x: x)
ops = FUSED._replace(attention=sdpa_attention)
sizes = transformer.Config(8, 4, 4, 1, 2)
cfg = transformer.Config(8, 4, 4, 1, 2, norm="layer", ffn=gated(lambda x: x), qk_norm="head", mixer=("attention",))
model = transformer.make(cfg, ops, remat)
loss: Loss = model.loss
"""

WRONG = """
from torch import Tensor
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.protocols import Attention, RMSNorm
from purelm.optim import Optimizer
from purelm.train import Strategy

def no_window(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    return q

def no_result(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> None: ...

attention: Attention = no_window  # wrong
norm: RMSNorm = no_result  # wrong
ops = REFERENCE._replace(attention=no_window)  # wrong
cfg = transformer.Config(8, 4, 4, 1, 2, norm="batch")  # wrong
cfg = transformer.Config(8, 4, 4, 1, 2, qk_norm="heads")  # wrong
model = transformer.make(cfg, wrap_block=3)  # wrong
loss, metrics = model.loss({}, {}, zloss=0.1)  # wrong
logits, cache = model.decode({}, loss)  # wrong
optimizer = Optimizer(lambda params: None, lambda grads, state, lr: (grads, state))  # wrong
strategy = Strategy(differentiate=lambda loss: loss)  # wrong
"""


@pytest.mark.slow
def test_mypy_reports_wrong_signatures_and_no_right_ones(tmp_path):
    pytest.importorskip("mypy")
    for name, text in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    flags = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent"]
    files = [str(tmp_path / "right.py"), str(tmp_path / "wrong.py")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, *files], capture_output=True, text=True, cwd=ROOT
    )
    found = set(re.findall(r"(\w+)\.py:(\d+): error", done.stdout))
    expected = {("wrong", str(i)) for i, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    assert found == expected, done.stdout + done.stderr


def test_names_are_listed_once():
    """What Config accepts is what its types say."""
    assert config.AXES["norm"] == get_args(config.NormName) == ("rms", "layer", "none")
    for name, allowed in config.AXES.items():
        for value in allowed:
            assert value in repr(config.Config.__annotations__[name])
