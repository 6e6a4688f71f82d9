"""Getting a model file: where it comes from, the bytes, and putting it in its place once it is checked."""
