"""Encoder-decoder models on shards: two sequences cut over the same ranks."""
