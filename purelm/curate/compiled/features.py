"""The hashed n-grams of `purelm.curate.features` over UTF-8 bytes: one pass for words, one for n-grams."""

import numpy as np

from purelm.curate.characters import SPACE, SYMBOL
from purelm.curate.compiled.scanning import decode
from purelm.tokenizer.compiled.jit import loop, part


@part
def mix(x):
    """splitmix64's bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@part
def step(h, code):
    """One code point more of FNV-1a."""
    return (h ^ np.uint64(code)) * np.uint64(0x100000001B3)


@loop
def hash_ngrams(data, classes, words, codes, ids, buckets, word_ngrams, least, most):
    """Fill ids; returns how many. words uint64 and codes int64: room for every word, and for the longest and two."""
    n_words = found = i = 0
    n = data.size
    while i < n:
        code, size = decode(data, i)
        bits = classes[code]
        if bits & SPACE:
            i += size
            continue
        h = np.uint64(0xCBF29CE484222325)
        length = 1
        codes[0] = 60  # <
        while True:
            h = step(h, code)
            codes[length] = code
            length += 1
            i += size
            if bits & SYMBOL or i >= n:
                break
            code, size = decode(data, i)
            bits = classes[code]
            if bits & (SPACE | SYMBOL):
                break
        words[n_words] = mix(h)
        n_words += 1
        if most > 0:
            codes[length] = 62  # >
            length += 1
            for start in range(length):
                g = np.uint64(0x84222325CBF29CE4)
                for width in range(1, min(most, length - start) + 1):
                    g = step(g, codes[start + width - 1])
                    if width >= least:
                        ids[found] = np.int64(mix(g ^ np.uint64(width)) % np.uint64(buckets))
                        found += 1
    for j in range(n_words):
        g = words[j]
        ids[found] = np.int64(g % np.uint64(buckets))
        found += 1
        for k in range(1, min(word_ngrams, n_words - j)):
            g = mix(g * np.uint64(0x9E3779B97F4A7C15) + words[j + k])
            ids[found] = np.int64(g % np.uint64(buckets))
            found += 1
    return found
