"""Post-training: batches of prompts and responses, masked means, low-rank adapters.

    responses   pairs of prompts and responses as batches, padded or packed
    masked      masked_mean, masked_normalize: the denominator is an argument
    lora        init and merge of low-rank updates

The loss of supervised fine-tuning is the model's own, `model.loss`, on such a batch.
"""
