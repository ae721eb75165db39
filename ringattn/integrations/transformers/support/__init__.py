"""Finds out whether a model or a batch can be cut over ranks, and says why not."""
