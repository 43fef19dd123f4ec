"""Scaling laws: from runs of different sizes to laws, and from laws to decisions.

    runs = Runs(N, D, loss)
    law = variable_projection.fit(runs)
    best = optimum(law, flops=1e24)                    # parameters, tokens and loss

Functions are imported from their files.
"""
