"""Runs encoder-decoder models on shards: two sequences sharded over the same ranks."""
