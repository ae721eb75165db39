"""Shards models that have other towers (vision, audio) beside their text decoder."""
