"""Text from a model: batched sampling with a cache, one key a row.

    out = generate(model, params, prompts, key, max_new_tokens=50, sampling=Sampling(temperature=0.8), stop=Stop([end]))
    out.tokens[0], out.logprobs[0], out.finish_reasons[0]

A row's sample is a function of its prompt and its key alone: number i of the row's key decides the token at position
i of the row, whatever the batch, the padding or the number of tokens asked for. (Up to rounding: the logits of a row
may differ in the last bits from one batch shape to another, which can matter when two tokens are as good as equal.)
So dynamic_ntk, which looks at a length, is given the model's context_length: that of the longest row is not each row's.
"""

from purelm.generate.batched import Generation, Step, generate, stream
from purelm.generate.sampling import Sampling
from purelm.generate.stops import Stop

__all__ = ["Generation", "Sampling", "Step", "Stop", "generate", "stream"]
