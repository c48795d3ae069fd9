# SPDX-License-Identifier: Apache-2.0
"""The known families, by the `model_type` of their `config.json`."""

import dataclasses
from typing import Any

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.families.family import Family
from llm_jepa_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from llm_jepa_jax.models.families.llama import LLAMA
from llm_jepa_jax.models.families.mistral import MINISTRAL, MISTRAL
from llm_jepa_jax.models.families.olmo import OLMO2, OLMO3
from llm_jepa_jax.models.families.openelm import OPENELM
from llm_jepa_jax.models.families.phi import PHI, PHI3
from llm_jepa_jax.models.families.qwen import QWEN2, QWEN3
from llm_jepa_jax.models.families.stablelm import STABLELM
from llm_jepa_jax.models.families.starcoder import STARCODER2

_KNOWN = (
    LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, OLMO2, OLMO3, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, OPENELM, STABLELM,
    STARCODER2,
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _KNOWN}


def read_model(place: str, values: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the model that a `config.json` names; `place` is the file, for errors.

    Raises:
        UserError: the family is not known, or a field is missing, unknown or not supported.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{place}: `model_type` is {model_type!r}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    return family, family.read(place, values)


def family_of(config: ModelConfig) -> Family:
    """The family that can say this model, all of it: the one that `model.family` names, else the first.

    Raises:
        UserError: there is none.
    """
    named = config.family
    if named and named not in FAMILIES:
        raise UserError(f"config: `model.family`={named} is not known; use one of {', '.join(FAMILIES)}")
    reasons = {}
    for family in [FAMILIES[named]] if named else list(FAMILIES.values()):
        reasons[family.model_type] = _lost(family, config)
        if not reasons[family.model_type]:
            return family
    if named:
        raise UserError(f"config: family {named} cannot say {reasons[named]}; set model.family to another, or to ''")
    fewest = min(reasons.values(), key=len)
    raise UserError(f"config: no published family can say this model; nearest is one without {fewest}")


def _lost(family: Family, config: ModelConfig) -> str:
    """The keys that a family's `config.json` does not keep, with their values; empty: it keeps all."""
    try:
        back = family.read("config.json", family.write(config))
    except UserError as error:
        return str(error)
    before, after = (dataclasses.asdict(model) for model in (config, back))
    lost = [key for key in before if key not in ("family", "vocab_multiple") and before[key] != after[key]]
    return ", ".join(f"`model.{key}`={before[key]}" for key in lost)
