"""Post-training: batches, masked means, losses of preferences, low-rank adapters, graders, data.

    responses       pairs of prompts and responses as batches, padded or packed
    masked          masked_mean, masked_normalize: the denominator is an argument
    logits          log-probabilities and entropies of logits that another library's model gives
    answers         sums of log-probabilities over the tokens of an answer
    preferences     DPO and its family, KTO, a reward model's loss: functions of such sums
    reference_free  SimPO, ORPO, CPO: the same without a reference
    lora            init and merge of low-rank updates
    graders         whether an answer is right, and rewards
    data            rows of prompts and responses: read, cleaned, counted

The loss of supervised fine-tuning is the model's own, `model.loss`, on such a batch. Import these by name:
`from purelm.align import lora`. README.md has CS336's adapters, each in a few lines of these.
"""
