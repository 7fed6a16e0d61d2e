"""Nouns: names, streams, plans. No I/O, no clock, no third party."""
