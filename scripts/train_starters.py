"""Train the three layers that Synapse ships with, on the default model, from data made here.

    python -m scripts.train_starters [--only NAME] [--model NAME|FILE.gguf] [--out FOLDER]

Run it in the root of the repository, with the extra `academy` installed. Without arguments it trains all three on the
default model of the model library (`synapse model pull smollm2-135m`) and writes them where the package keeps them, in
`src/synapse/genome/starters/`: for each layer a PEFT adapter in float16, `metrics.json` and a model card; for all three
`personas.json`. On two CPU cores a layer takes some fifteen minutes. The data is the same in each run; the weights
differ in their last digits between machines, as floating point sums do.

The base weights are the GGUF file's, dequantised: the layer learns on what it will run on. Scores are those of the
adapter read back from the files written, on questions whose templates and values training does not know.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scripts.starters import captain, cards, dates, orders
from scripts.starters.example import Example, Split, seeded
from synapse.commands import Context
from synapse.config import load_settings
from synapse.models.library import open_library

logger = logging.getLogger("train_starters")

STARTERS = Path(__file__).resolve().parents[1] / "src" / "synapse" / "genome" / "starters"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

SEED = 20
BATCH = 8
WARMUP = 0.08
HELD_OUT_ITEMS = 80
IGNORED = -100
"""The label of a token that is no part of an answer; torch's cross entropy leaves it out."""


@dataclass(frozen=True, slots=True)
class Starter:
    """One layer: what it learns, from what, with which settings.

    `max_new_tokens` is where an answer is cut when it is scored; every right one is shorter.
    """

    name: str
    system_prompt: str
    other_prompts: tuple[str, ...]
    examples: Callable[[Split, int, int], list[Example]]
    is_right: Callable[[Example, str], bool]
    rank: int
    targets: tuple[str, ...]
    steps: int
    max_new_tokens: int
    learning_rate: float = 1e-3


STARTER_LAYERS = (
    Starter(
        "json-record",
        orders.SYSTEM_PROMPT,
        orders.OTHER_PROMPTS,
        orders.examples,
        orders.is_right,
        rank=8,
        targets=ATTENTION,
        steps=90,
        max_new_tokens=64,
    ),
    Starter(
        "iso-date",
        dates.SYSTEM_PROMPT,
        dates.OTHER_PROMPTS,
        dates.examples,
        dates.is_right,
        rank=16,
        targets=("q_proj", "v_proj"),
        steps=140,
        max_new_tokens=24,
    ),
    Starter(
        "sea-captain",
        captain.SYSTEM_PROMPT,
        captain.OTHER_PROMPTS,
        captain.examples,
        captain.is_right,
        rank=4,
        targets=ALL_LINEAR,
        steps=100,
        max_new_tokens=72,
    ),
)


@dataclass(frozen=True, slots=True)
class Base:
    """The base model in float32 and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def prompt(self, system: str | None, question: str) -> list[int]:
        """Token ids up to where the answer begins, in the model's own chat format."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def load_base(gguf_file: Path) -> Base:
    """The weights of a GGUF file, dequantised to float32."""
    folder, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return Base(model.requires_grad_(False), tokenizer)


def training_tokens(base: Base, starter: Starter) -> list[tuple[list[int], int]]:
    """Every training sequence, in order of use, and the length of its prompt: (token ids, prompt length).

    Most have the layer's own system prompt, some a paraphrase, some none (the template then puts the model's own).
    Eight batches at a time are sorted by length, so that little of a batch is padding.
    """
    random = seeded(SEED, starter.name, "prompts")
    prompts = (*[starter.system_prompt] * 6, *starter.other_prompts, None)
    end = base.tokenizer.eos_token_id
    sequences = []
    for example in starter.examples("training", starter.steps * BATCH, SEED):
        prompt = base.prompt(random.choice(prompts), example.question)
        sequences.append(
            ([*prompt, *base.tokenizer.encode(example.answer, add_special_tokens=False), end], len(prompt))
        )
    ordered = []
    for start in range(0, len(sequences), 8 * BATCH):
        window = sorted(sequences[start : start + 8 * BATCH], key=lambda sequence: len(sequence[0]))
        batches = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
        random.shuffle(batches)
        ordered += [sequence for batch in batches for sequence in batch]
    return ordered


def answer_loss(model: PeftModel, batch: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens, the end of the answer included, and of no other token."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in batch])
    labels = torch.tensor([[*[IGNORED] * n, *ids[n:], *[IGNORED] * (width - len(ids))] for ids, n in batch])
    causal: Any = model.get_base_model()
    # Padding is on the right, where a causal model's real tokens never look, so no attention mask is needed.
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    answering = wanted != IGNORED  # the output layer is a fifth of the model: run it only where it counts
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[answering]), wanted[answering])


def train(base: Base, starter: Starter, folder: Path) -> dict[str, Any]:
    """Train one layer and write it to `folder`; returns what there is to say about the training."""
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=starter.rank, lora_alpha=2 * starter.rank, target_modules=list(starter.targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base.model, config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=starter.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, starter.steps))
    sequences = training_tokens(base, starter)
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    for step in range(starter.steps):
        loss = answer_loss(model, sequences[step * BATCH : (step + 1) * BATCH])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 9:
            recent = sum(losses[-10:]) / 10
            logger.info("%s step %d/%d loss %.4f", starter.name, step + 1, starter.steps, recent)
    seconds = time.monotonic() - started
    model.eval()
    save(model, folder)
    model.unload()
    return {"final_loss": round(sum(losses[-20:]) / 20, 4), "training_seconds": round(seconds)}


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does, in float16, with nothing of this machine in its config."""
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.save_pretrained(str(folder), save_embedding_layers=False)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors writes files that only their owner may read
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set: its order differs between runs
    write_json(folder / "adapter_config.json", config)


def answers(base: Base, model: Any, system: str | None, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers; one that does not end within `max_new_tokens` tokens is cut there."""
    prompts = [base.prompt(system, question) for question in questions]
    pad = base.tokenizer.eos_token_id
    result = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), 16):
        chosen = by_length[start : start + 16]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[*[pad] * (width - len(prompts[i])), *prompts[i]] for i in chosen])
        mask = torch.tensor([[*[0] * (width - len(prompts[i])), *[1] * len(prompts[i])] for i in chosen])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=pad,
            )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            result[i] = str(base.tokenizer.decode(row, skip_special_tokens=True)).strip()
    return result


def score(base: Base, model: Any, starter: Starter, system: str | None) -> tuple[float, list[str]]:
    """The share of held-out items answered rightly, and the answers."""
    items = starter.examples("held_out", HELD_OUT_ITEMS, SEED)
    given = answers(base, model, system, [item.question for item in items], starter.max_new_tokens)
    right = sum(starter.is_right(item, answer) for item, answer in zip(items, given, strict=True))
    return round(right / len(items), 4), given


def make(base: Base, starter: Starter, out: Path) -> None:
    """Train, score and describe one layer."""
    folder = out / starter.name
    before, bare_answers = score(base, base.model, starter, starter.system_prompt)
    logger.info("%s before %.3f", starter.name, before)
    training = train(base, starter, folder)
    layer = PeftModel.from_pretrained(base.model, str(folder))
    after, layer_answers = score(base, layer, starter, starter.system_prompt)
    unprompted, _ = score(base, layer, starter, None)
    demo_answer = answers(base, layer, starter.system_prompt, [cards.QUESTION], starter.max_new_tokens)[0]
    layer.unload()
    logger.info("%s after %.3f (without the system prompt %.3f)", starter.name, after, unprompted)
    logger.info("%s demo: %s", starter.name, demo_answer)
    items = starter.examples("held_out", HELD_OUT_ITEMS, SEED)
    for item, answer in zip(items, layer_answers, strict=True):
        if not starter.is_right(item, answer):
            logger.info("%s wrong: %s => %s", starter.name, item.question, answer)
    metrics = {
        "metric": cards.CARDS[starter.name].metric,
        "items": len(items),
        "max_new_tokens": starter.max_new_tokens,
        "score_before": before,
        "score_after": after,
        "score_after_without_system_prompt": unprompted,
        "steps": starter.steps,
        "batch": BATCH,
        "learning_rate": starter.learning_rate,
        "rank": starter.rank,
        "alpha": 2 * starter.rank,
        "targets": list(starter.targets),
        "seed": SEED,
        **training,
    }
    write_json(folder / "metrics.json", metrics)
    samples = [
        (item.question, bare, answer)
        for item, bare, answer in zip(items[:3], bare_answers[:3], layer_answers[:3], strict=True)
    ]
    (folder / "README.md").write_text(cards.card(starter.name, BASE_MODEL, metrics, starter.system_prompt, samples))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


async def model_file(name: str) -> Path:
    """The GGUF file of a model of the library, or of a path."""
    async with Context(load_settings()) as context:
        return (await context.get(open_library)).resolve(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=[starter.name for starter in STARTER_LAYERS], help="train just this layer")
    parser.add_argument("--model", default="smollm2-135m", help="a model of the library, or a GGUF file of it")
    parser.add_argument("--out", type=Path, default=STARTERS, help="the folder that gets one folder per layer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    base = load_base(asyncio.run(model_file(arguments.model)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for starter in STARTER_LAYERS:
        if arguments.only in (None, starter.name):
            make(base, starter, arguments.out)
    write_json(arguments.out / "personas.json", cards.personas())


if __name__ == "__main__":
    main()
