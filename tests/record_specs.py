# SPDX-License-Identifier: Apache-2.0
"""Records where the state of presets lies on meshes, `specs/NAME.txt` each: `python -m tests.record_specs`."""

import dataclasses
import math
import pathlib

from jax.sharding import AbstractMesh

from llm_jepa_jax.config import MeshConfig, freeze
from llm_jepa_jax.main import parse
from llm_jepa_jax.parallel.mesh import AXES, AXIS_TYPES, mesh_shape
from llm_jepa_jax.plan.shardings import shardings, warnings
from llm_jepa_jax.vocabulary import padded

DIRECTORY = pathlib.Path(__file__).parent / "specs"
CASES: dict[str, tuple[str, MeshConfig, tuple[str, ...]]] = {
    "llama1b-data8": ("llama1b.py", MeshConfig(data=8), ()),
    "llama8b-fsdp64": ("llama8b.py", MeshConfig(data=1, fsdp=64), ()),
    "llama8b-slices2-fsdp32-tensor2": ("llama8b.py", MeshConfig(slices=2, data=1, fsdp=32, tensor=2), ()),
    "llama8b-lora-nf4-fsdp8": ("llama8b.py", MeshConfig(data=1, fsdp=8), ("lora.rank=16", "lora.base_dtype=nf4")),
    "llama70b-fsdp64-tensor4": ("llama70b.py", MeshConfig(data=1, fsdp=64, tensor=4), ()),
    "llama405b-slices2-fsdp128-tensor8": (
        "llama405b.py", MeshConfig(slices=2, data=1, fsdp=128, tensor=8), ("opt.second_moment=factored",)
    ),
    "llama8b-fsdp16-context4": ("llama8b.py", MeshConfig(data=1, fsdp=16, context=4), ()),
    "gemma2_2b-fsdp8-tensor2": ("gemma2_2b.py", MeshConfig(data=1, fsdp=8, tensor=2), ()),
    "olmo2_7b-data2-fsdp16": ("olmo2_7b.py", MeshConfig(data=2, fsdp=16), ("objective.jepa.linear_predictor=True",)),
    "openelm_1b-smoke-fsdp8": ("openelm_1b.py:smoke", MeshConfig(data=1, fsdp=8), ("model.vocab_size=512",)),
    "phi1_5-fsdp4-tensor4": ("phi1_5.py", MeshConfig(data=1, fsdp=4, tensor=4), ()),
    "qwen3_1_7b-padded-fsdp4": ("qwen3_1_7b.py", MeshConfig(data=1, fsdp=4), ("model.vocab_size=151669",)),
}  # fmt: skip
"""By name: a preset, its mesh, and what else differs from the preset."""


def lines(name: str) -> list[str]:
    """What one file holds."""
    preset, sizes, changes = CASES[name]
    config = freeze(parse(["main", f"--config=configs/{preset}", *(f"--config.{each}" for each in changes)]).config)
    mesh = AbstractMesh(
        mesh_shape(sizes, math.prod(each for each in vars(sizes).values() if each > 0)), AXES, axis_types=AXIS_TYPES
    )
    config = dataclasses.replace(config, mesh=sizes, model=padded(config.model, sizes.tensor))
    found = shardings(config, mesh)
    return [*map(str, found), *(f"warning: {line}" for line in warnings(found, mesh))]


def main() -> None:
    """Writes every file."""
    DIRECTORY.mkdir(exist_ok=True)
    for name in CASES:
        (DIRECTORY / f"{name}.txt").write_text("\n".join(lines(name)) + "\n")


if __name__ == "__main__":
    main()
