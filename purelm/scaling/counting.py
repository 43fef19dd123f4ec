"""What N and C are: conventions of counting, which move exponents more than most else.

Kaplan et al. 2020 count 12 n d^2 parameters, without embeddings and head; Hoffmann et al. 2022 count all. On small
models these differ by factors, and with them the exponent of N* of C: Porian et al. 2024 (arXiv:2406.19146) find .835
by Kaplan's counting and .707 once the head's FLOPs count. So each function says what it counts, and a law's runs must
all be counted by one of them. `purelm.accounting` counts exactly, by part.
"""

__all__ = ["kaplan_parameters", "non_embedding_flops", "six_n"]


def kaplan_parameters(n_layers: int, d_model: int) -> int:
    """12 n d^2: attention's 4 d^2 and a feed-forward's 8 d^2 of each layer (Kaplan et al. 2020, equation 2.1).

    >>> kaplan_parameters(12, 768)
    84934656
    """
    return 12 * n_layers * d_model**2


def six_n(parameters: float) -> float:
    """Training FLOPs a token: 6 N, attention's scores left out."""
    return 6.0 * parameters


def non_embedding_flops(n_layers: int, d_model: int, length: int) -> int:
    """Training FLOPs a token, M = 72 n d^2 + 12 n d l: with attention's scores, without embeddings and head.

    DeepSeek LLM (arXiv:2401.02954), equation 2; with C = M D in the place of 6 N D.

    >>> non_embedding_flops(12, 768, 1024)
    622854144
    """
    return 72 * n_layers * d_model**2 + 12 * n_layers * d_model * length
