"""The forward pass in NumPy: the specification of the native engine."""
