"""Web data: from crawls to documents that are worth training on, by pure functions on one document each.

`document` says what a step is. Functions are imported from their files.
"""
