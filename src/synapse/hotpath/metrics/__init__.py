"""What is counted of every call of a hot path, and what of it is alarming."""
