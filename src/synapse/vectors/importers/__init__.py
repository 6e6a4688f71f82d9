"""Vectors that other programs keep, read without changing anything there."""
