"""The walk of py3langid's automaton over the bytes of a text."""

from purelm.tokenizer.compiled.jit import loop


@loop
def walk(next_state, row_of, feature_of, data, found):
    """Fill `found` with the features that are met, in order, and return their number.

    next_state: (rows, 256) flat; row_of (states,); feature_of (states,), -1 for none; data: uint8.
    """
    state, n = 0, 0
    for i in range(data.size):
        state = int(next_state[(int(row_of[state]) << 8) + int(data[i])])
        feature = feature_of[state]
        if feature >= 0:
            found[n] = feature
            n += 1
    return n
