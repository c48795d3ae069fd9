# SPDX-License-Identifier: Apache-2.0
"""What a family of published models is: how its `config.json` says a model, and what it calls each parameter."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.families.fields import WITHOUT_EFFECT, Fields
from llm_jepa_jax.models.families.parts import Part

LAYER = "model.layers.{}"
"""Of a tensor's published name; the layer's number goes into the braces."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, as data."""

    model_type: str
    architecture: str
    """The class that `transformers` opens it with."""
    parts: tuple[Part, ...]
    names: Mapping[str, str]
    """Our parameters (`layers/query`) to published tensors, weights without their `.weight`; a name ending in `_bias`
    is its weight's with `.bias`. Parameters with the same tensor are its rows, one behind the other in this order."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of `ModelConfig` that are the same in all its models, where they are not our defaults."""
    without_effect: tuple[str, ...] = ()
    """Fields of this family that change neither hidden states nor logits."""

    def read(self, place: str, values: dict[str, Any]) -> ModelConfig:
        """The model that a `config.json` describes; `place` names the file in errors.

        Raises:
            UserError: a field is missing, unknown or not supported.
        """
        fields, known = Fields(place, values), dict(self.fixed)
        for part in self.parts:
            known |= part.read(fields, known)
        fields.finish(WITHOUT_EFFECT | set(self.without_effect))
        return ModelConfig(**known, family=self.model_type)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The fields that describe a model, which may not be all of it: see `registry.family_of`."""
        values = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            values |= part.write(config)
        return values

    def tensor(self, parameter: str) -> str:
        """The published name of a parameter of ours; `{}` stands for the layer's number.

        Raises:
            KeyError: the family has no such parameter.
        """
        if parameter in self.names:
            return f"{self.names[parameter]}.weight"
        return f"{self.names[parameter.removesuffix('_bias')]}.bias"

    def place(self, parameter: str) -> int:
        """Where the parameter stands among those that share its tensor."""
        return list(self.names).index(parameter if parameter in self.names else parameter.removesuffix("_bias"))


SEQUENTIAL = {
    "embedding": "model.embed_tokens",
    "layers/attention_norm": f"{LAYER}.input_layernorm",
    "layers/query": f"{LAYER}.self_attn.q_proj",
    "layers/key": f"{LAYER}.self_attn.k_proj",
    "layers/value": f"{LAYER}.self_attn.v_proj",
    "layers/out": f"{LAYER}.self_attn.o_proj",
    "layers/query_norm": f"{LAYER}.self_attn.q_norm",
    "layers/key_norm": f"{LAYER}.self_attn.k_norm",
    "layers/mlp_norm": f"{LAYER}.post_attention_layernorm",
    "layers/gate": f"{LAYER}.mlp.gate_proj",
    "layers/up": f"{LAYER}.mlp.up_proj",
    "layers/down": f"{LAYER}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
"""The names that Llama's descendants share."""
