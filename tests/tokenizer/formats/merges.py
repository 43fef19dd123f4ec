"""Random merges for a tokenizer.json."""


def random_merges(rng, vocab, pool):
    """Up to 14 merges of pieces in the pool, in random order; what they make is put into vocab and pool."""
    merges = []
    for _ in range(rng.randint(0, 14)):
        left, right = rng.choices(pool, k=2)
        if [left, right] not in merges and len(left + right) < 7:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                pool.append(left + right)
            merges.append([left, right])
    rng.shuffle(merges)
    return merges
