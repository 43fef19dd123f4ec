"""Learning rate and batch size by scale, as published power laws. Adam; batch sizes in tokens.

They are measured with each source's own data, schedule and counting, and are starts for one's own search.
"""

from purelm.scaling.laws import PowerLaw, power

__all__ = [
    "DEEPSEEK_BATCH",
    "DEEPSEEK_LR",
    "critical_batch",
    "deepseek",
    "steplaw",
    "steps_and_tokens",
]

DEEPSEEK_LR, DEEPSEEK_BATCH = PowerLaw(0.3118, -0.1250), PowerLaw(0.2920, 0.3271)  # of C = M D, non-embedding FLOPs


def deepseek(flops: float) -> tuple[float, float]:
    """(peak learning rate, tokens of a batch) = (.3118 C^-.1250, .2920 C^.3271); DeepSeek LLM, arXiv:2401.02954, eq. 1.

    flops: `counting.non_embedding_flops` times tokens.
    """
    return power(DEEPSEEK_LR, _positive("flops", flops)), power(DEEPSEEK_BATCH, flops)


def steplaw(parameters: float, tokens: float) -> tuple[float, float]:
    """(peak learning rate, tokens of a batch) = (1.79 N^-.713 D^.307, .58 D^.571); StepLaw, arXiv:2503.04715.

    parameters: without embeddings. For a schedule whose final learning rate is 1e-5, whatever the peak.
    """
    n, d = _positive("parameters", parameters), _positive("tokens", tokens)
    return 1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571


def critical_batch(loss: float, star: float = 2.1e8, exponent: float = 0.21) -> float:
    """Tokens of a batch at which steps and tokens are both twice their least: B* / L^(1 / exponent).

    Kaplan et al. 2020, equation 5.3: B* = 2.1e8 tokens, exponent .21.
    """
    return _positive("star", star) / _positive("loss", loss) ** (1 / _positive("exponent", exponent))


def steps_and_tokens(batch: float, critical: float, least_steps: float) -> tuple[float, float]:
    """(steps, tokens) to one loss at this batch, of least_steps at an infinite one: (S / S_min - 1)(E / E_min - 1) = 1.

    McCandlish et al. 2018 (arXiv:1812.06162), equation 2.11: S = S_min (1 + B_crit / B), E = S B, E_min = S_min B_crit.

    >>> steps_and_tokens(1e6, 1e6, 1000)
    (2000.0, 2000000000.0)
    """
    b, c = _positive("batch", batch), _positive("critical", critical)
    steps = _positive("least_steps", least_steps) * (1 + c / b)
    return steps, steps * b


def _positive(name: str, x: float) -> float:
    if not 0 < x < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {x}")
    return x
