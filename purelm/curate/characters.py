"""What the quality rules ask of a character: a table of bits for all code points.

The properties are those of Python's own str methods and unicodedata, so plain Python and machine code agree; only the
terminal punctuation is `regex`'s property Sentence_Terminal (datatrove 0.10.1 lists 159 characters, all in it but the
three Khmer signs U+17D6, U+17D9, U+17DA).
"""

import unicodedata

import numpy as np
import regex

from purelm.caches import memo

__all__ = ["CLOSER", "DIGIT", "LETTER", "SENTENCE", "SPACE", "SYMBOL", "TERMINAL", "UPPER", "character_table"]

SPACE = 1  # str.isspace: what str.split cuts at
LETTER = 2  # str.isalpha
SYMBOL = 4  # punctuation, symbols, control characters and what is unassigned: Unicode's categories P, S and C
UPPER = 8  # str.isupper
DIGIT = 16  # str.isdigit
TERMINAL = 32  # ends a sentence in some script
SENTENCE = 64  # . ! ?
CLOSER = 128  # quotation marks and brackets that may follow the end of a sentence

CLOSERS = "\"')]}\u2019\u201d\u00bb"


@memo(1)
def character_table() -> np.ndarray:
    """Bits of each code point, uint8 (0x110000,), read-only; 0.5 s on the first call, then kept.

    >>> bits = character_table()
    >>> bits[ord("A")] == LETTER | UPPER, bits[ord(".")] == SYMBOL | TERMINAL | SENTENCE
    (np.True_, np.True_)
    """
    table = np.zeros(0x110000, np.uint8)
    for code in range(0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        bits = SYMBOL if category[0] in "PSC" else 0
        if category not in ("Cn", "Co", "Cs"):
            bits |= character.isspace() * SPACE | character.isalpha() * LETTER
            bits |= character.isupper() * UPPER | character.isdigit() * DIGIT
        table[code] = bits
    for low, high in ((0, 0xD800), (0xE000, 0x110000)):  # surrogates between them are no characters
        for match in regex.finditer(r"\p{Sentence_Terminal}", "".join(map(chr, range(low, high)))):
            table[low + match.start()] |= TERMINAL
    for characters, bit in ((".!?", SENTENCE), (CLOSERS, CLOSER)):
        table[[ord(character) for character in characters]] |= bit
    table.setflags(write=False)
    return table
