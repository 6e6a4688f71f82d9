"""Quantised weights in a file that all processes map."""
