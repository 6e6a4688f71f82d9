"""Exact search among vectors: an index, its compact codes, and the kernel that scans them."""
