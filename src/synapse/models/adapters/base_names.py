"""Whether a name that an adapter gives for its base model clearly means another model.

`base_model_name_or_path` is a hub id, a name, or a path on the machine that trained the adapter, so it can say much
or nothing. Shapes decide what is possible; the name only rules out what shapes cannot (SmolLM and SmolLM2 have the
same shapes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_CACHE = re.compile(r"models--[^/]+--([^/]+)")
SIZE = re.compile(r"\d+(?:\.\d+)?[mb]")
VERSION = re.compile(r"v?(\d+(?:\.\d+)?)")
# Words that many models share, so that sharing them proves nothing.
COMMON = frozenset({"a", "base", "chat", "f16", "gguf", "hf", "instruct", "it", "meta", "model", "of", "the"})
# What people call the results of training, whatever the model: `outputs/checkpoint-500` names none.
RESULTS = frozenset(
    {
        "adapter", "best", "checkpoint", "checkpoints", "ckpt", "current", "dpo", "epoch", "exp", "experiment", "final",
        "finetune", "finetuned", "global", "last", "latest", "lora", "merged", "models", "my", "new", "out", "output",
        "outputs", "result", "results", "run", "runs", "saved", "sft", "step", "test", "tmp", "trained", "training",
    }
)  # fmt: skip
NUMBERED = re.compile(r"(?:checkpoint|ckpt|epoch|exp|experiment|run|step|v)?\d+(?:\.\d+)?")
QUANTISATION = re.compile(r"(?:q\d|k|m|s|l|0|1|bf16|fp16|f32|4bit|8bit|bnb|gptq|awq)")


def says_another_model(base: str, names: Iterable[str]) -> bool:
    """Whether `base`, as PEFT wrote it, names a model that is none of `names`.

    Only the last part of a path or hub id is read. Two names differ when their sizes (135m, 1b) differ, or their
    versions (3, 3.2) differ, or they share no word of the family (smollm2, llama). A path on disk without a size in
    its last part says nothing, and neither do names of no known word, nor those of results of training.
    """
    known = [words for words in (_words(_last_part(name)) for name in names) if words]
    said = _words(_last_part(base))
    a_path = _words(base.partition("/")[0]) <= RESULTS
    named = any(word not in RESULTS and not NUMBERED.fullmatch(word) for word in said)
    informative = named and ((bool(HUB_ID.fullmatch(base)) and not a_path) or any(map(SIZE.fullmatch, said)))
    if not known or not said or not informative:
        return False
    return all(_differ(said, words) for words in known)


def _last_part(base: str) -> str:
    cached = HUB_CACHE.search(base)
    return cached[1] if cached else Path(base.replace("\\", "/")).name


def _words(name: str) -> frozenset[str]:
    words = re.split(r"[^a-z0-9.]+", name.lower().removesuffix(".gguf"))
    return frozenset(word for word in words if word and word not in COMMON and not QUANTISATION.fullmatch(word))


def _differ(one: frozenset[str], other: frozenset[str]) -> bool:
    for kind in (SIZE, VERSION):
        ours, theirs = ({w.lstrip("v") for w in words if kind.fullmatch(w)} for words in (one, other))
        if ours and theirs and not ours & theirs:
            return True
    families = ({w for w in words if not SIZE.fullmatch(w) and not VERSION.fullmatch(w)} for words in (one, other))
    ours, theirs = families
    return bool(ours) and bool(theirs) and not ours & theirs
