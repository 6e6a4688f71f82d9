"""Encoders as files: a folder as sentence-transformers writes it, read and checked."""
