# SPDX-License-Identifier: Apache-2.0
"""Rotary settings of models whose layers with a window have their own."""

import dataclasses
from typing import Any

from llm_jepa_jax.config import ModelConfig, RopeScalingConfig
from llm_jepa_jax.models.families.fields import Fields
from llm_jepa_jax.models.families.parts import Rope

LOCAL_FIELD = "rope_local_base_freq"


@dataclasses.dataclass(frozen=True)
class TwoRopes:
    """Rotary settings of global layers and of those with a window, in either spelling; both are written."""

    theta: float
    local_theta: float = 0.0
    """The base of windowed layers in the old spelling where it has none; 0: that of all layers, for which the family
    has no field."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        new = fields.below("rope_parameters")
        if "full_attention" not in new:
            new.finish()
            wide = Rope(self.theta).read(fields, known)
            local = fields.take(LOCAL_FIELD, float, self.local_theta) if self.local_theta else wide["rope_theta"]
            return self._both(wide, local)
        for name in ("rope_theta", LOCAL_FIELD, "rope_scaling"):
            fields.take(name, dict if name == "rope_scaling" else float, None)
        globally, locally = new.below("full_attention"), new.below("sliding_attention")
        new.finish()
        wide = Rope(self.theta).read(_only(fields, globally), known)
        near = Rope(self.local_theta or self.theta).read(_only(fields, locally), known)
        if near["rope_scaling"].factor != 1.0:
            raise fields.refuse("rope_parameters", "scaled in windowed layers", "use a model whose are not")
        return self._both(wide, near["rope_theta"])

    def _both(self, wide: dict[str, Any], local_theta: float) -> dict[str, Any]:
        """Without a difference, all layers share one table."""
        same = local_theta == wide["rope_theta"] and wide["rope_scaling"] == RopeScalingConfig()
        return wide | {"local_rope_theta": 0.0 if same and not self.local_theta else local_theta}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values, theta = Rope(self.theta).write(config), config.local_rope_theta or config.rope_theta
        local = {"rope_type": "default", "rope_theta": theta}
        values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
        return values | ({LOCAL_FIELD: theta} if self.local_theta else {})


def _only(fields: Fields, section: Fields) -> Fields:
    """A file whose rotary settings are that section."""
    return Fields(fields.place, {"rope_parameters": section.rest()})
