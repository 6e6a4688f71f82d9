"""Reading PEFT's `adapter_config.json`: what a LoRA adapter says about itself, and why some are refused.

The fields are those of `peft.LoraConfig` 0.21. Each is either harmless for the forward pass, read here, or changes the
formula y = W x + s B A x (or the base weights W themselves); the last are refused with a reason, and so is a field
nobody here knows, unless it is empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from synapse.models.adapters.errors import LayerCorrupt, LayerRefused
from synapse.models.safetensors_file import parse_json_object

MAX_RANK = 256
MAX_PATTERNS = 2048

# Fields that say how the adapter was trained, or that the weights file shows better.
HARMLESS = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "exclude_modules",
        "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    }
)  # fmt: skip
READ = frozenset(
    {
        "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "layers_to_transform", "init_lora_weights", "bias",
    }
)  # fmt: skip
# Fields that change what the layer computes: the reason code, and what a person reads.
REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("dora", "it is a DoRA adapter, which also rescales the base weights"),
    "modules_to_save": ("modules_to_save", "it replaces whole modules of the base model"),
    "lora_bias": ("bias", "its factors have a bias"),
    "fan_in_fan_out": ("fan_in_fan_out", "its weights are transposed (fan_in_fan_out)"),
    "use_qalora": ("variant", "it pools its input (QALoRA)"),
    "alora_invocation_tokens": ("variant", "it is only active after certain tokens (aLoRA)"),
    "layer_replication": ("variant", "it repeats blocks of the base model"),
    "target_parameters": ("variant", "it adapts bare parameters, not linear projections"),
    "trainable_token_indices": ("variant", "it changes rows of the embedding"),
    "use_bdlora": ("variant", "it is block-diagonal (BD-LoRA)"),
    "arrow_config": ("variant", "it routes between several adapters (Arrow)"),
    "kasa_config": ("variant", "it truncates the base weights (KaSA)"),
    "monteclora_config": ("variant", "it samples its weights (MonteCLoRA)"),
    "megatron_config": ("variant", "it needs Megatron's own linear modules"),
}
# Initialisations that leave the base weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not, unless PEFT
# converted the adapter when saving it, and then it writes `true` here.
PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
# PEFT runs the keys of the two patterns as regular expressions. Names with dots between ^ and $ cannot be slow.
PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+\$?")
RETRAIN = "train or convert it as plain LoRA"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the config says. The two patterns map module names (suffixes) to a rank or alpha other than the default."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    target_modules: tuple[str, ...] | None
    blocks: frozenset[int] | None
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """The rank of a module such as ``model.layers.0.self_attn.q_proj``."""
        return next((rank for key, rank in self.rank_pattern if key.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023), of a module."""
        alpha = next((alpha for key, alpha in self.alpha_pattern if key.match(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT would apply weights to this module. Targets given as one regular expression are not run."""
        return self.target_modules is None or any(
            module == target or module.endswith(f".{target}") for target in self.target_modules
        )


def _rank(value: object, field: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise LayerRefused("bad_rank", f"{field} must be a whole number from 1 to {MAX_RANK}, not {value!r:.40}")
    return value


def _alpha(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LayerRefused("bad_alpha", f"{field} must be a number, not {value!r:.40}")
    if not 0 < value < 1e6:  # also false for NaN
        raise LayerRefused("bad_alpha", f"{field} must be above 0 and finite, not {value!r:.40}")
    return float(value)


def _pattern(raw: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    pattern = raw.get(field) or {}
    if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
        raise LayerCorrupt("bad_config", f"{field} must map at most {MAX_PATTERNS} module names to numbers")
    for key in pattern:
        if not PATTERN.fullmatch(key):
            raise LayerRefused(
                "bad_pattern",
                f"the key {key!r:.80} of {field} is a regular expression; those of strangers are not run",
                hint="write module names there, such as layers.0.self_attn.q_proj",
            )
    return pattern


def _compiled(key: str) -> re.Pattern[str]:
    """How PEFT's `get_pattern_key` matches a key: the first one that fits the end of the module's name wins."""
    return re.compile(rf"(.*\.)?({key})$")


def _targets(value: object) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise LayerCorrupt("bad_config", "target_modules must be text or a list of module names")
    return tuple(value)


def _blocks(value: object) -> frozenset[int] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise LayerCorrupt("bad_config", "layers_to_transform must be a whole number or a list of them")
    return frozenset(numbers) or None


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise LayerCorrupt("bad_config", f"{field} must be true or false, not {value!r:.40}")
    return bool(value)


def parse_config(data: bytes) -> AdapterConfig:
    """Check the bytes of an `adapter_config.json`.

    Raises:
        LayerCorrupt: not JSON, or a field of the wrong type (``bad_json``, ``bad_config``).
        LayerRefused: ``peft_type``, ``dora``, ``bias``, ``modules_to_save``, ``fan_in_fan_out``, ``variant``,
            ``initialisation``, ``bad_rank``, ``bad_alpha`` or ``bad_pattern``.
    """
    raw = parse_json_object(data, "adapter_config.json")
    if raw.get("peft_type") != "LORA":
        raise LayerRefused(
            "peft_type", f"the adapter is of the type {raw.get('peft_type')!r:.40}; layers are LORA", hint=RETRAIN
        )
    for field, (reason, message) in REFUSED.items():
        if raw.get(field):
            raise LayerRefused(reason, f"the adapter cannot be a layer: {message}", hint=RETRAIN, field=field)
    if raw.get("bias", "none") != "none":
        raise LayerRefused("bias", f"the adapter also trained biases (bias={raw['bias']!r:.40})", hint=RETRAIN)
    start = raw.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in PLAIN_INITIALISATIONS:
        raise LayerRefused(
            "initialisation",
            f"the adapter starts from {start!r:.40}, which changes the base weights",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA",
        )
    for field in sorted(raw.keys() - HARMLESS - READ - REFUSED.keys()):
        if raw[field]:
            raise LayerRefused(
                "variant", f"the adapter sets {field!r:.80}, which Synapse does not know", hint=RETRAIN, field=field
            )
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise LayerCorrupt("bad_config", "base_model_name_or_path must be text")
    ranks, alphas = _pattern(raw, "rank_pattern"), _pattern(raw, "alpha_pattern")
    return AdapterConfig(
        rank=_rank(raw.get("r"), "r"),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
        rslora=_flag(raw, "use_rslora"),
        rank_pattern=tuple((_compiled(key), _rank(n, f"rank_pattern[{key}]")) for key, n in ranks.items()),
        alpha_pattern=tuple((_compiled(key), _alpha(n, f"alpha_pattern[{key}]")) for key, n in alphas.items()),
        target_modules=_targets(raw.get("target_modules")),
        blocks=_blocks(raw.get("layers_to_transform")),
        base_model=base or None,
    )
