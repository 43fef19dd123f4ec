"""The shared pass of `purelm.curate.words` over UTF-8 bytes: one loop, no memory of its own."""

from purelm.curate.characters import CLOSER, DIGIT, LETTER, SENTENCE, SPACE, SYMBOL, TERMINAL, UPPER
from purelm.tokenizer.compiled.jit import loop, part


@part
def decode(data, i):
    """(code point at byte i, number of bytes); three bytes for a lone surrogate."""
    byte = data[i]
    if byte < 0x80:
        return int(byte), 1
    if byte < 0xE0:
        return int(byte & 31) << 6 | int(data[i + 1] & 63), 2
    if byte < 0xF0:
        return int(byte & 15) << 12 | int(data[i + 1] & 63) << 6 | int(data[i + 2] & 63), 3
    high = int(byte & 7) << 18 | int(data[i + 1] & 63) << 12
    return high | int(data[i + 2] & 63) << 6 | int(data[i + 3] & 63), 4


@loop
def scan_bytes(data, classes, totals, rows):
    """Fill totals, int64 (12,) in the order of Totals, and as many rows as there are lines and room."""
    characters = words = counted = counted_characters = lettered = hashes = ellipses = newlines = 0
    n_lines = bullets = ellipsis_lines = punctuated = 0
    dots = 0  # that stand before this character in a row
    # Of the line: dots that it ends with so far, and its last character, white space left out.
    first = last = line_start = line_end = line_dots = 0
    line_words = longest = uppers = digits = sentences = 0
    length = seen = closed = 0  # of the word: bits of its characters, and of the last one that closes nothing
    not_symbol = False
    ends = True  # whether the last word of the line ends a sentence
    i, n = 0, data.size
    while i <= n:
        code, step = decode(data, i) if i < n else (10, 1)  # a newline after the end closes the last line
        bits = int(classes[code])
        if not bits & SPACE:
            if length == 0:
                line_dots = 0
                if line_words == 0:
                    first, line_start = code, characters
            last = code
            length += 1
            characters += 1
            line_end = characters
            seen |= bits
            if not bits & SYMBOL:
                not_symbol = True
            if not bits & CLOSER:
                closed = bits
            uppers += (bits & UPPER) != 0
            digits += (bits & DIGIT) != 0
            if code == 46:
                dots += 1
                line_dots += 1
                if dots == 3:
                    ellipses += 1
                    dots = 0
            else:
                dots = line_dots = 0
                hashes += code == 35
                ellipses += code == 0x2026
            i += step
            continue
        if length > 0:
            line_words += 1
            longest = max(longest, length)
            lettered += (seen & LETTER) != 0
            if not_symbol:
                counted += 1
                counted_characters += length
            ends = (closed & SENTENCE) != 0
            sentences += ends
            length = seen = closed = 0
            not_symbol = False
        dots = 0
        if code == 10:
            if line_words > 0:
                words += line_words
                bullets += first == 45 or first == 0x2022
                ellipsis_lines += last == 0x2026 or (last == 46 and line_dots >= 3)
                punctuated += (int(classes[last]) & TERMINAL) != 0
                if n_lines < rows.shape[0]:
                    rows[n_lines, 0] = line_end - line_start
                    rows[n_lines, 1] = line_words
                    rows[n_lines, 2] = longest
                    rows[n_lines, 3] = uppers
                    rows[n_lines, 4] = digits
                    rows[n_lines, 5] = sentences + (not ends)
                n_lines += 1
                line_words = longest = uppers = digits = sentences = 0
                ends = True
            newlines += i < n
        characters += i < n
        i += step
    totals[0], totals[1], totals[2], totals[3] = characters, words, counted, counted_characters
    totals[4], totals[5], totals[6], totals[7] = lettered, hashes, ellipses, newlines
    totals[8], totals[9], totals[10], totals[11] = n_lines, bullets, ellipsis_lines, punctuated
