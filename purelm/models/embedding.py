"""From tokens to the residual stream, and from its end to logits.

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
    """Token vectors, plus those of positions where these are learned."""
    x_BTD = ops.embedding(tokens_BT, params["token_embeddings"]["weight"])
    if cfg.position == "learned":
        x_BTD = x_BTD + ops.position_embedding(positions, params["position_embeddings"]["weight"])
    return x_BTD


def unembedding(params: Params, cfg: Config) -> Float[Tensor, "v d"]:
    """The matrix from states to logits: the token embeddings themselves when tied."""
    return params["token_embeddings" if cfg.tie_embeddings else "lm_head"]["weight"]


def readout(params: Params, h: Float[Tensor, "*b d"], cfg: Config, ops: Ops) -> Float[Tensor, "*b v"]:
    """Logits of final states."""
    return soft_cap(ops.unembed(h, unembedding(params, cfg)), cfg.logit_softcap)
