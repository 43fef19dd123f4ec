"""The training service: a budget of device-seconds, a queue, and runs of models that are only described."""
