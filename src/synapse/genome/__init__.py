"""Layers and genomes: LoRA adapters kept by their content, and the weighted stacks that personas are made of.

`entities` says what is kept, `registry` keeps the layers' files, `stack` turns a genome into what an engine loads.
Nothing is imported here: the store reads `entities` alone, without NumPy and the model files.
"""
