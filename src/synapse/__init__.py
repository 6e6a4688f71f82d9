"""Synapse: many AI personas on one modest machine."""

__version__ = "0.1.0"
