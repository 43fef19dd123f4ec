"""From tokens to the residual stream, and from final states to logits.

Legend: B batch, T positions, D d_model, V vocabulary.
"""

from jaxtyping import Float
from torch import Tensor

from purelm.models.config import Config
from purelm.models.leaves import Params
from purelm.ops import Ops
from purelm.ops.softcap import soft_cap

__all__ = ["embed", "readout", "unembedding"]


def embed(params: Params, tokens_BT: Tensor, positions: Tensor, cfg: Config, ops: Ops) -> Float[Tensor, "b t d"]:
    """Token embeddings, plus position embeddings if cfg.position is "learned"."""
    x_BTD = ops.embedding(tokens_BT, params["token_embeddings"]["weight"])
    if cfg.position == "learned":
        x_BTD = x_BTD + ops.position_embedding(positions, params["position_embeddings"]["weight"])
    return x_BTD


def unembedding(params: Params, cfg: Config) -> Float[Tensor, "v d"]:
    """The matrix W in logits = h W^T: lm_head, or the token embeddings if they are tied."""
    return params["token_embeddings" if cfg.tie_embeddings else "lm_head"]["weight"]


def readout(params: Params, h: Float[Tensor, "*b d"], cfg: Config, ops: Ops) -> Float[Tensor, "*b v"]:
    """Logits of final states h: h W^T, then the soft cap c tanh(logits / c) if cfg.logit_softcap is c."""
    return soft_cap(ops.unembed(h, unembedding(params, cfg)), cfg.logit_softcap)
