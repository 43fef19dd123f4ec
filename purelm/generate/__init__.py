"""Text from a model: batched sampling with a KV cache and a random key for each row.

    out = generate(model, params, prompts, key, max_new_tokens=50, sampling=Sampling(temperature=0.8), stop=Stop([end]))
    out.tokens[0], out.logprobs[0], out.finish_reasons[0]

A row's sample depends on its prompt and its key alone: the token at position i of the row is drawn with the key's i-th
random number, whatever the other rows, the padding and max_new_tokens. Two remarks:

- This holds up to rounding. A row's logits may differ in the last bits from one batch shape to another, which matters
  where two tokens are almost equally probable.
- dynamic_ntk scales by a sequence length. `generate` gives it context_length, since the length of the longest row would
  make a row's sample depend on the others.
"""

from purelm.generate.batched import Generation, Step, generate, stream
from purelm.generate.sampling import Sampling
from purelm.generate.stops import Stop

__all__ = ["Generation", "Sampling", "Step", "Stop", "generate", "stream"]
