"""What lorahub recognises and keeps but cannot put into arithmetic, and the reason in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# config's peft_type -> why it cannot be merged (LORA, LOHA and LOKR can)
_TYPES = {
    "IA3": "IA3 multiplies activations instead of adding a delta",
    "SHIRA": "SHiRA changes scattered entries and has no low-rank form",
    "VERA": "VeRA's matrices are regenerated from a seed and the base's shapes: the file is not self-contained",
    "UNILORA": "Uni-LoRA holds one vector; its projection is regenerated from a seed and the base's module order",
    "RANDLORA": "RandLoRA's bases are regenerated from a seed: the file is not self-contained",
    "VBLORA": "VB-LoRA composes factors from a shared vector bank",
    "ADALORA": "AdaLoRA stores a triple product with pruned ranks; export it as LoRA with PEFT first",
    "FOURIERFT": "FourierFT stores a spectrum, which has no low-rank form",
    "OFT": "OFT rotates the base's weights: its effect depends on the base",
    "BOFT": "BOFT rotates the base's weights: its effect depends on the base",
    "HRA": "HRA reflects the base's weights: its effect depends on the base",
    "MISS": "MiSS shares blocks along the input and has no plain low-rank form here",
    "BONE": "Bone updates blocks from the base's weights: its effect depends on the base",
    "PROMPT_TUNING": "prompt tuning learns input vectors, not a change of weights",
    "P_TUNING": "p-tuning learns an input encoder, not a change of weights",
    "PREFIX_TUNING": "prefix tuning learns keys and values, not a change of weights",
    "LN_TUNING": "LN tuning trains normalisation layers, which are not low-rank",
    "FINEGATES": "FineGates multiplies rows and columns of the base's weights",
    "GLORA": "GLoRA multiplies the base's weights: its effect depends on the base",
    "POLY": "Poly routes between several LoRAs at run time",
    "XLORA": "X-LoRA routes between several LoRAs at run time",
    "CPT": "CPT learns input vectors, not a change of weights",
    "TRAINABLE_TOKENS": "only token embeddings are trained, which are not low-rank",
}
_MERGEABLE_TYPES = {"LORA", "LOHA", "LOKR"}

# suffixes of tensor names -> the same types, for files without a configuration
_KEYS: tuple[tuple[str, str], ...] = (
    (r"\.ia3_l(\.|$)", "IA3"),
    (r"\.shira_(indices|weight)", "SHIRA"),
    (r"\.?vera_(lambda_[bd]|[AB])$", "VERA"),
    (r"unilora_theta_d$", "UNILORA"),
    (r"\.?randlora_", "RANDLORA"),
    (r"\.?vblora_", "VBLORA"),
    (r"\.fourierft_spectrum", "FOURIERFT"),
    (r"\.(oft_r|oft_R|oft_blocks|oft_diag)(\.|$)", "OFT"),
    (r"\.boft_[RsP]", "BOFT"),
    (r"\.hra_u", "HRA"),
    (r"\.miss_block", "MISS"),
    (r"\.bone_block", "BONE"),
    (r"\.finegates_", "FINEGATES"),
    (r"^prompt_embeddings$", "PROMPT_TUNING"),
    (r"\.lora_E(\.|$)", "ADALORA"),
    (r"^(lora|lycoris)_\w+\.[ab][12]\.weight$", "GLORA"),
    (r"^(lora|lycoris)_\w+\.on_input$", "IA3"),
    (r"\.(w_norm|b_norm)$", "LN_TUNING"),
)
_COMPILED = [(re.compile(pattern), kind) for pattern, kind in _KEYS]

# values of init_lora_weights that change the base's own weights at the start of training
_MUTATED = ("pissa", "olora", "corda", "lora_ga", "loraga")


def declared_type(config: Mapping[str, Any] | None) -> str:
    """The configuration's peft_type as a word in capitals; empty where there is none."""
    return re.sub(r"\W+", "_", str((config or {}).get("peft_type") or "").upper(), flags=re.ASCII)[:40]


def foreign_type(config: Mapping[str, Any] | None, keys: Iterable[str]) -> str | None:
    """The adapter type, in PEFT's spelling, of something that is not low-rank; None where it is or may be."""
    declared = declared_type(config)
    if declared and declared not in _MERGEABLE_TYPES:
        return declared
    for key in keys:
        for pattern, kind in _COMPILED:
            if pattern.search(key):
                return kind
    return None


def type_reason(kind: str) -> str:
    """Why adapters of this type cannot be merged."""
    return _TYPES.get(kind, f"adapters of type {kind} are not known to be low-rank")


def config_reason(config: Mapping[str, Any]) -> str | None:
    """Why a LoRA with this configuration is not the plain delta that its tensors show; None if it is."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATED):
        return (
            f"init_lora_weights={init} changed the base's weights in training, so the delta is not relative to the "
            "base; convert it with PEFT (path_initial_model_for_weight_conversion) first"
        )
    flags = {
        "use_dora": "DoRA renormalises the base's weights: its effect is not additive without the base",
        "use_qalora": "QALoRA pools its inputs in groups, which a plain LoRA does not",
        "use_bdlora": "BD-LoRA stores block-diagonal factors",
        "kasa_config": "KaSA truncates the base's weights",
        "layer_replication": "layer replication changes the base's layers",
        "alora_invocation_tokens": "an activated LoRA works from its invocation tokens on, not everywhere",
        "target_parameters": "adapted parameters of experts are folded into the rank; lorahub cannot unfold them",
    }
    return next((reason for flag, reason in flags.items() if config.get(flag)), None)
