"""Native kernels: compiled from Mojo for this CPU, kept in a cache, and checked before a call is made into them."""
