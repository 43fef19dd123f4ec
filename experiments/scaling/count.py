"""What N is, of a configuration of the training service: laws of N counted differently are not comparable.

all: every parameter. head: those that multiply, all but the token embeddings (Porian et al. 2024 count the head, too).
blocks: without embeddings and head. kaplan: 12 n d^2. Tied embeddings are the head.
"""

from typing import TYPE_CHECKING, Literal

from purelm.scaling.counting import kaplan_parameters

if TYPE_CHECKING:
    from experiments.scaling.service.schemas import ArchitectureConfig

__all__ = ["Counting", "count"]

Counting = Literal["all", "head", "blocks", "kaplan"]


def count(a: "ArchitectureConfig", counting: Counting) -> int:
    """N by this convention."""
    from experiments.scaling.service.schemas import n_parameters  # needs pydantic, of the extra `service`

    if counting == "kaplan":
        return kaplan_parameters(a.num_hidden_layers, a.hidden_size)
    table = a.vocab_size * a.hidden_size
    n_tables = {"all": 0, "head": 0 if a.tie_word_embeddings else 1, "blocks": 1 if a.tie_word_embeddings else 2}
    return n_parameters(a) - n_tables[counting] * table
