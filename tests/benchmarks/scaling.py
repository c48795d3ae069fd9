# SPDX-License-Identifier: Apache-2.0
"""How presets scale over topologies, by the planner: one JSON line a case, the table of docs/scaling.md with `--table`.

`python tests/benchmarks/scaling.py` ranks every mesh, micro-batching and remat by arithmetic, which takes minutes and
no compiler; `--compile` has the best of each compiled as well. Nothing runs on a TPU: every time is an estimate.
"""

import argparse
import json
import logging
import sys
from typing import Any

from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.main import parse
from llm_jepa_jax.plan.chips import GIB
from llm_jepa_jax.plan.search import Candidate, by_compiler, candidates
from llm_jepa_jax.plan.shapes import Assumptions, step_shape
from llm_jepa_jax.plan.topology import compile_devices, parse_topology, prepare_environment

PRESETS = ("llama1b", "llama8b", "llama70b", "llama405b")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:2x2x4", "v5p:4x4x8", "v5p:8x8x8", "v5p:16x16x16", "v6e:16x16", "tpu7x:4x4x8")
VARIANTS: dict[str, list[str]] = {
    "full": [],
    "lora": ["--config.lora.rank=16"],
    "ntp": ["--config.objective.jepa.weight=0"],
}
"""All weights with JEPA; adapters with JEPA; all weights with next-token training alone."""
ROWS, ROW_LENGTH = 512, 8192
"""Of a step: 4.2 million tokens on up to 512 chips, and a row a chip beyond."""
COLUMNS = (
    "topology", "chips", "mesh", "micro-batches, remat", "GiB a chip", "s a step: computing + kernels + waiting",
    "utilisation", "chip-hours for 10⁹ tokens",
)  # fmt: skip


def config_of(preset: str, variant: str, chips: int) -> Config:
    arguments = [
        "main", f"--config=configs/{preset}.py", f"--config.data.rows_per_step={max(ROWS, chips)}",
        f"--config.data.row_length={ROW_LENGTH}", "--config.data.layout=shared", "--config.objective.jepa.dropout=0",
        *VARIANTS[variant],
    ]  # fmt: skip
    return freeze(parse(arguments).config)


def best(config: Config, topology_name: str, compiled: bool) -> tuple[Candidate | None, Candidate | None]:
    """The fastest that fits, or None, and what comes nearest to fitting."""
    topology = parse_topology(topology_name)
    shape = step_shape(config, Assumptions())
    ranked = candidates(config, shape, topology, compile_devices(topology))
    fitting = [each for each in ranked if each.fits]
    if not compiled or not fitting:
        return (fitting or [None])[0], (ranked or [None])[0]
    done = by_compiler(fitting[0], shape, topology)
    return (done if done.fits else None), done


def line_of(preset: str, variant: str, topology_name: str, compiled: bool) -> dict[str, Any]:
    topology = parse_topology(topology_name)
    config = config_of(preset, variant, topology.num_chips)
    shape = step_shape(config, Assumptions())
    found, nearest = best(config, topology_name, compiled)
    line: dict[str, Any] = {
        "preset": preset,
        "variant": variant,
        "topology": topology_name,
        "chips": topology.num_chips,
    }
    if found is None:
        short = nearest.memory.peak / GIB if nearest else None
        return line | {"fits": False, "needs_gib": short, "has_gib": topology.chip.hbm / GIB}
    timeline, tokens = found.timeline, config.data.rows_per_step * shape.length
    waits = {f"{'x'.join(axes)} {kind}": each.exposed for (axes, _, kind), each in timeline.traffic.items()}
    return line | {
        "fits": True,
        "how": found.how,
        "mesh": dict(found.mesh.shape),
        "micro_batches": found.config.train.micro_batches,
        "remat": found.config.train.remat,
        "peak_gib": found.memory.peak / GIB,
        "has_gib": topology.chip.hbm / GIB,
        "seconds": timeline.seconds,
        "computing": timeline.compute,
        "kernels": timeline.kernels,
        "waiting": timeline.exposed,
        "waits": waits,
        "utilisation": found.utilisation(shape, topology),
        "tokens_per_s": tokens / timeline.seconds,
        "chip_hours_per_1e9_tokens": 1e9 / tokens * timeline.seconds / 3600 * topology.num_chips,
    }


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["|" + "|".join(f" {name} " for name in COLUMNS) + "|", "|" + "---|" * len(COLUMNS)]
    for line in lines:
        if not line["fits"]:
            needs = f"{line['needs_gib']:.0f} of {line['has_gib']:.1f}" if line["needs_gib"] else "–"
            rows.append(f"| {line['topology']} | {line['chips']:,} | does not fit | | {needs} | | | |")
            continue
        mesh = " x ".join(f"{axis} {size}" for axis, size in line["mesh"].items() if size > 1)
        rows.append(
            f"| {line['topology']} | {line['chips']:,} | {mesh} | {line['micro_batches']}, {line['remat']} | "
            f"{line['peak_gib']:.1f} of {line['has_gib']:.1f} | {line['computing']:.2f} + {line['kernels']:.2f} + "
            f"{line['waiting']:.2f} | {line['utilisation']:.0%} | {line['chip_hours_per_1e9_tokens']:,.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Every case asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--variants", default="full,lora")
    parser.add_argument("--compile", action="store_true", help="compile the best of each")
    parser.add_argument("--table", metavar="FILE", help="make a table of a file with these lines")
    args = parser.parse_args()
    if args.table:
        with open(args.table) as file:
            every = [json.loads(line) for line in file]
        for preset, variant in dict.fromkeys((line["preset"], line["variant"]) for line in every):
            print(f"\n### {preset}, {variant}\n")
            print(table([line for line in every if (line["preset"], line["variant"]) == (preset, variant)]))
        return
    logging.getLogger("llm_jepa_jax").setLevel(logging.WARNING)
    prepare_environment(parse_topology("v5p:2x2x4"))
    for preset in args.presets.split(","):
        for variant in args.variants.split(","):
            for topology in args.topologies.split(","):
                print(json.dumps(line_of(preset, variant, topology, args.compile)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
