"""Laws that you run on your own functions, for those who test by properties.

    check_op            a function of tensors: derivatives, transforms, compile, strides, dtypes
    check_model         a Model: causality, packing, padding, cache, loss, gradients
    check_loss          a loss: any split of the batch, masked tokens, order, gradients
    check_optimizer     an Optimizer: purity, absent leaves, dtypes, chain, vmap, compile
    check_collective    a linear map between processes, and its adjoint

Each check runs a table of named laws and raises one `LawError` for all that fail. `laws=` runs some of them:
`laws=["vmap", "jvp"]`, or `laws=without(OP_LAWS, "compile")`. `purelm.testing.strategies` draws trees, configurations,
batches and texts; it needs hypothesis (pip install 'purelm[testing]'), the laws need nothing more than the library.
"""

from purelm.testing.collectives import COLLECTIVE_LAWS, check_collective
from purelm.testing.laws import LawError, assert_trees_close, assert_trees_equal, without
from purelm.testing.losses import LOSS_LAWS, check_loss
from purelm.testing.model_cache_laws import CACHE_LAWS
from purelm.testing.models import MODEL_LAWS, check_model
from purelm.testing.operations import OP_LAWS, check_op
from purelm.testing.optimizers import OPTIMIZER_LAWS, check_optimizer

__all__ = [
    "CACHE_LAWS",
    "COLLECTIVE_LAWS",
    "LOSS_LAWS",
    "MODEL_LAWS",
    "OPTIMIZER_LAWS",
    "OP_LAWS",
    "LawError",
    "assert_trees_close",
    "assert_trees_equal",
    "check_collective",
    "check_loss",
    "check_model",
    "check_op",
    "check_optimizer",
    "without",
]
