"""Language models as values: a `Model` is a tuple of pure functions of parameters; `transformer` makes them.

    from purelm.models import transformer
    model = transformer.make(transformer.Config(vocab_size=256, context_length=64, d_model=64, n_layers=2, n_heads=4))

Import modules by name, as purelm.models.transformer. `model` and `protocols` say what a Model is; `leaves` is the
table of its parameters; `block`, `mixers`, `feed_forward`, `norms`, `linear` are the parts of a Transformer.
"""
