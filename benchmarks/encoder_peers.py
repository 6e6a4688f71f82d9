"""The peers of `benchmarks.encoder`, in a process of their own, because they may live in another environment.

Run as a file, `python benchmarks/encoder_peers.py`, with an interpreter that has some of sentence-transformers,
onnxruntime, torch, transformers and onnx. It reads one JSON object a line and answers each with one:

    {"do": "load", "folder": …, "texts": […], "threads": n}  ->  {"ready": {name: version}, "missing": {name: reason}}
    {"do": "encode", "peer": name}                           ->  {"seconds": …}
    {"do": "vectors", "peer": name}                          ->  {"shape": […], "float32": base64}
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32

Encode = Callable[[list[str]], Any]
"""Texts to their vectors of length 1, float32[texts, dimensions]."""


def with_sentence_transformers(folder: str, threads: int) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu")
    return lambda texts: model.encode(
        texts, batch_size=BATCH, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )


def export_onnx(folder: str, target: Path) -> None:
    """The encoder without its pooling as ONNX, from the same weights, with all the fusions that onnxruntime knows."""
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    hidden = Hidden()
    ones = torch.ones((2, 8), dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    with torch.no_grad():
        torch.onnx.export(
            hidden,
            (ones, ones),
            str(target),
            input_names=names,
            output_names=["hidden"],
            dynamic_axes={name: {0: "texts", 1: "tokens"} for name in [*names, "hidden"]},
            opset_version=17,
            dynamo=False,  # the fusions know the graphs of this exporter
        )
    config = hidden.encoder.config
    heads, width = config.num_attention_heads, config.hidden_size
    fused = optimizer.optimize_model(str(target), model_type="bert", num_heads=heads, hidden_size=width)
    fused.save_model_to_file(str(target))


def with_onnxruntime(folder: str, threads: int, work: Path, *, int8: bool = False) -> Encode:
    import onnxruntime
    from transformers import AutoTokenizer

    path = work / "encoder.onnx"
    if not path.exists():
        export_onnx(folder, path)
    if int8:
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantised = work / "encoder-int8.onnx"
        plain = {"DefaultTensorType": TensorProto.FLOAT}  # of what comes out of fused operators
        quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, per_channel=True, extra_options=plain)
        path = quantised
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = json.loads((Path(folder) / "sentence_bert_config.json").read_text())["max_seq_length"]

    def encode(texts: list[str]) -> Any:
        vectors: Any = None
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(texts), BATCH):
            chosen = order[start : start + BATCH]
            tokens = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=longest, return_tensors="np"
            )
            mask = tokens["attention_mask"]
            (hidden,) = session.run(["hidden"], {"input_ids": tokens["input_ids"], "attention_mask": mask})
            pooled = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
            if vectors is None:
                vectors = np.empty((len(texts), pooled.shape[1]), np.float32)
            vectors[chosen] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return vectors

    return encode


def load(folder: str, threads: int, work: Path) -> tuple[dict[str, Encode], dict[str, str], dict[str, str]]:
    """The peers that can be had here, their versions, and why the others cannot."""
    makers: dict[str, tuple[str, Callable[[], Encode]]] = {
        "sentence-transformers": ("sentence-transformers", lambda: with_sentence_transformers(folder, threads)),
        "onnxruntime": ("onnxruntime", lambda: with_onnxruntime(folder, threads, work)),
        "onnxruntime int8": ("onnxruntime", lambda: with_onnxruntime(folder, threads, work, int8=True)),
    }
    peers, ready, missing = {}, {}, {}
    for name, (package, make) in makers.items():
        try:
            peers[name] = make()
            ready[name] = version(package)
        except ImportError as error:
            missing[name] = str(error)
    return peers, ready, missing


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not get into the answers
    peers: dict[str, Encode] = {}
    texts: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        for line in sys.stdin:
            asked = json.loads(line)
            answer: dict[str, Any]
            if asked["do"] == "load":
                texts = asked["texts"]
                peers, ready, missing = load(asked["folder"], asked["threads"], Path(work))
                answer = {"ready": ready, "missing": missing}
            elif asked["do"] == "encode":
                start = time.perf_counter()
                peers[asked["peer"]](texts)
                answer = {"seconds": time.perf_counter() - start}
            else:
                vectors = np.asarray(peers[asked["peer"]](texts), "<f4")
                answer = {"shape": vectors.shape, "float32": base64.b64encode(vectors.tobytes()).decode()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
