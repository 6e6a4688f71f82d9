"""The native engine: packed weights, kernels, and what calls them."""
