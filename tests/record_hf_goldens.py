# SPDX-License-Identifier: Apache-2.0
"""Records `data/hf_goldens.npz` with `transformers`: `python -m tests.record_hf_goldens` (needs the parity extra)."""

import json
import pathlib
import tempfile

import numpy as np
import torch

from tests.hf_models import make_model, reference

PATH = pathlib.Path(__file__).parent / "data" / "hf_goldens.npz"
CASES = (
    "llama3", "mistral", "ministral", "qwen2-windows", "qwen3-yarn", "olmo2", "olmo3", "gemma", "gemma2", "gemma3",
    "phi", "phi3", "stablelm", "starcoder2",
)  # fmt: skip
SMALL = {"vocab_size": 24, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
OWN = {
    "phi": {"head_dim": 4},
    "gemma3": {"num_hidden_layers": 6, "head_dim": 6},
    "ministral": {"num_hidden_layers": 3, "head_dim": 6},
    "olmo3": {"num_hidden_layers": 4, "head_dim": 6},
    "stablelm": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "starcoder2": {},
}
"""Those whose width of heads is D / H, and whose layer without a window comes later than the second."""


def main() -> None:
    """Weights are rounded to float16, in which they are stored; logits are those of the rounded weights in float32."""
    arrays = {}
    for case in CASES:
        model = make_model(case, **SMALL | OWN.get(case, {"head_dim": 6}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            arrays[f"{case}/config"] = np.array((pathlib.Path(directory) / "config.json").read_text())
        for name, value in model.state_dict().items():
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                arrays[f"{case}/weights/{name}"] = value.numpy().astype(np.float16)
        tokens = np.random.default_rng(0).integers(3, 24, 70)
        arrays[f"{case}/tokens"] = tokens.astype(np.int32)
        arrays[f"{case}/logits"] = reference(model, tokens)[1][::5]
    assert json.loads(str(arrays["phi/config"]))["model_type"] == "phi"
    np.savez_compressed(PATH, **arrays)
    print(PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
