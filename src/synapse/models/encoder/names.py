"""What the files of an encoder are called, as sentence-transformers writes them."""

from __future__ import annotations

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MODULES_FILE = "modules.json"
SENTENCE_FILE = "sentence_bert_config.json"
POOLING_FOLDER = "1_Pooling"
POOLING_FILE = f"{POOLING_FOLDER}/{CONFIG_FILE}"

REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
OPTIONAL_FILES = (
    TOKENIZER_FILE, VOCABULARY_FILE, TOKENIZER_CONFIG_FILE, MODULES_FILE, SENTENCE_FILE, POOLING_FILE,
)  # fmt: skip
"""What else is read where it is there; one of the first two has to be."""
