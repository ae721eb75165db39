"""Models with towers beside their text decoder: vision, audio."""
