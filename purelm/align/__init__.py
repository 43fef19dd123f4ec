"""Post-training: batches, masked means, losses of preferences, low-rank adapters, graders, data.

    responses   pairs of prompts and responses as batches, padded or packed
    masked      masked_mean, masked_normalize: the denominator is an argument
    logits      log-probabilities and entropies of logits that another library's model gives
    ratios, regions, regions_token, regions_sequence, regions_batch, weights, divergences, aggregation
                policy losses, composed of functions of log-probabilities, advantages and a mask
    tokens      what these share: masking, sums of rows, shares
    answers     sums of log-probabilities over the tokens of an answer
    preferences DPO and its family, KTO, a reward model's loss: functions of such sums; reference_free: SimPO, ORPO, CPO
    chats       which tokens of a conversation the assistant wrote
    rollouts    prompts and sampled answers as ids, with the sampler's log-probabilities and rewards
    lora        init and merge of low-rank updates
    graders     whether an answer is right, and rewards
    data        rows of prompts and responses: read, cleaned, counted
    objective   the loss of a policy from advantages, ratios, regions, weights and aggregation; recipes has known ones
    filters     which prompts and groups teach something; shaping, collect and controllers stand beside it

The loss of supervised fine-tuning is the model's own, `model.loss`, on such a batch. Import these by name:
`from purelm.align import lora`. README.md has CS336's adapters, each in a few lines of these.
"""
