"""Text from a model: batched sampling with a KV cache and a random key for each row.

    out = generate(model, params, prompts, key, max_new_tokens=50, sampling=Sampling(temperature=0.8), stop=Stop([end]))
    out.tokens[0], out.logprobs[0], out.finish_reasons[0]

`stream` gives a step at a time. `continued` is of one row, takes over what a `Past` has computed of its prompt, and
gives the past of each new token: the turns of a conversation.

A row's sample depends on its prompt and its key alone: the token at position i of the row is drawn with the key's i-th
random number, whatever the other rows, the padding, batch_size, read_every and max_new_tokens. Two remarks:

- This holds up to rounding. A row's logits may differ in the last bits from one batch shape to another, which matters
  where two tokens are almost equally probable.
- dynamic_ntk scales by a sequence length. `generate` gives it context_length, since the length of the longest row would
  make a row's sample depend on the others.
"""

from purelm.generate.batched import generate, stream
from purelm.generate.continued import Continued, Past, continued, empty_past
from purelm.generate.graphs import on_graph, reused
from purelm.generate.sampling import Sampling
from purelm.generate.stops import Stop
from purelm.generate.types import Generation, Progress, Sample, Step

__all__ = [
    "Continued",
    "Generation",
    "Past",
    "Progress",
    "Sample",
    "Sampling",
    "Step",
    "Stop",
    "continued",
    "empty_past",
    "generate",
    "on_graph",
    "reused",
    "stream",
]
