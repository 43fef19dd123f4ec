"""torch's class-based interfaces over purelm's functions, for programs that are written for those classes.

Optimizers change parameters in place, as torch.optim does and such programs expect; the arithmetic is that of the
wrapped optimizer. `functional`, `ddp` and `fsdp` take modules.
"""

from purelm.interop.fully_sharded import FullySharded, fsdp
from purelm.interop.modules import DataParallel, ddp, functional
from purelm.interop.optimizers import ShardedOptimizer, sharded_optimizer, whole_state_dict
from purelm.interop.torch_optimizer import TorchOptimizer

__all__ = [
    "DataParallel",
    "FullySharded",
    "ShardedOptimizer",
    "TorchOptimizer",
    "ddp",
    "fsdp",
    "functional",
    "sharded_optimizer",
    "whole_state_dict",
]
