"""Laws that you run on your own functions, for those who test by properties.

Each check runs a table of named laws and raises one `LawError` for all that fail. `laws=` runs some of them:
`laws=["vmap", "jvp"]`, or `laws=without(OP_LAWS, "compile")`. `purelm.testing.strategies` draws trees, configurations,
batches and texts; it needs hypothesis (pip install 'purelm[testing]'), the laws need nothing more than the library.
"""

from purelm.testing.laws import LawError, assert_trees_close, assert_trees_equal, without
from purelm.testing.operations import OP_LAWS, check_op

__all__ = ["OP_LAWS", "LawError", "assert_trees_close", "assert_trees_equal", "check_op", "without"]
