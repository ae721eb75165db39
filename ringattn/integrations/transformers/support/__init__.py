"""Determines whether a model or a batch can be sharded over ranks, and reports why not."""
