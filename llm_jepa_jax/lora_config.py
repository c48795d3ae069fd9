# SPDX-License-Identifier: Apache-2.0
"""The keys of adapters: the section `lora` of the schema in `config.py`."""

import dataclasses

from llm_jepa_jax.schema import key

LINEAR_LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
"""Names of the linear layers of a block, which can have adapters; `gate` where the MLP is gated."""
QUANTIZED = ("int8", "nf4")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = key(
        0,
        "rank of the adapters (LoRA): a low-rank matrix pair beside each target is trained, and everything else stays "
        "as `init.checkpoint` has it; 0: no adapters, all weights are trained. With `lora.adapter`, 0: its rank",
    )
    alpha: float = key(
        16.0, "what adapters add is multiplied by alpha / rank; with `lora.adapter`, a default is what it has"
    )
    rslora: bool = key(False, "it is multiplied by alpha / sqrt(rank) instead (rank-stabilised LoRA)")
    dropout: float = key(0.0, "share of an adapter's inputs that are dropped in training")
    targets: str = key(
        "",
        f"linear layers with adapters, comma separated, among {', '.join(LINEAR_LAYERS)}; empty: all there are",
    )
    base_dtype: str = key(
        "",
        "type that the frozen matrices are kept in; empty: `train.dtype`. `int8` and `nf4` (QLoRA) quantise the linear "
        "layers of blocks, and keep embedding and head in `train.dtype`. Frozen norms and biases: `train.param_dtype`",
        choices=("", "float32", "bfloat16", *QUANTIZED),
    )
    tile_size: int = key(64, "inputs of a quantised weight that share a scale", "weights")
    adapter: str = key(
        "", "directory of a PEFT adapter (adapter_config.json and safetensors) to start from; empty: the base as it is"
    )

    @property
    def is_quantized(self) -> bool:
        """Whether the blocks' frozen linear layers are kept in codes."""
        return self.base_dtype in QUANTIZED

    @property
    def scale(self) -> float:
        """What adapters add is multiplied by this."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
