# SPDX-License-Identifier: Apache-2.0
"""`--mode=verify`: runs, published directories or models of the hub, compared two by two; one is held at a time."""

import dataclasses
import functools
import json
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from llm_jepa_jax.analysis.compare import (
    HIDDEN_TOLERANCE,
    Comparison,
    Input,
    Measured,
    compare,
    long_length,
    make_inputs,
    measure,
    verdict,
)
from llm_jepa_jax.checkpoint.hf_directory import is_published, open_directory
from llm_jepa_jax.checkpoint.initial import OWN_KEYS
from llm_jepa_jax.checkpoint.places import Place, place
from llm_jepa_jax.config import Config, ModelConfig, freeze, to_dict
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.from_json import load_json
from llm_jepa_jax.models.lora import merged
from llm_jepa_jax.models.transformer import abstract_params
from llm_jepa_jax.run_directory import FILES, Run, on_all_devices, open_published, open_run
from llm_jepa_jax.schema import flatten

LOG = logging.getLogger("llm_jepa_jax")
SEED = 0
"""Of the tokens that both models read."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two models, before its weights are read."""

    name: str
    directory: Place
    model: ModelConfig
    run: Config | None
    """Of a run; None: a published model."""
    types: Mapping[str, np.dtype]
    """What its weights are stored in, by parameter (`layers/query`)."""

    def open(self) -> Run:
        """Reads the weights, onto all devices."""
        LOG.info("verify: %s: reading the weights", self.name)
        if self.run is None:
            return open_published(self.directory)
        return open_run(self.directory, on_all_devices(self.run))


def find_side(name: str) -> Side:
    """What a run's directory, a published one, or an id of the hub says of its model.

    Raises:
        UserError: it is none of these, or a file is missing or damaged.
    """
    directory = place(name)
    if is_published(directory):
        checkpoint = open_directory(directory)
        stored = {p.path: {checkpoint.tensors[tensor].dtype for tensor in p.names} for p in checkpoint.parameters}
        types = {path: max(found, key=_precision) for path, found in stored.items()}
        return Side(name, directory, checkpoint.model, None, types)
    missing = [file for file in FILES if not (directory / file).exists()]
    if missing:
        raise UserError(
            f"{name}: has no {missing[0]}; name a run's directory ({', '.join(FILES)}) or a published model's"
        )
    config = freeze(load_json(directory / "config.json"))
    paths = dict.fromkeys(_paths(config.model), np.dtype(jnp.dtype(config.train.param_dtype)))
    return Side(name, directory, config.model, config, paths)


def _paths(model: ModelConfig) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, jnp.float32)[0])
    return [_path(entries) for entries, _ in leaves]


def _path(entries: Any) -> str:
    return "/".join(entry.key for entry in entries)


def _precision(dtype: np.dtype) -> int:
    """Bits of a mantissa."""
    return int(jnp.finfo(dtype).nmant)


def verify(workdir: str, against: str, out: str, max_positions: int) -> dict[str, Any]:
    """Compares two models, of which only one is held at a time, and says where they part.

    Raises:
        UserError: a side cannot be read, or they have other numbers of layers or another width.
    """
    if not against:
        raise UserError("--mode=verify: nothing to compare with; pass --against=DIR (a run's or a published model's)")
    if max_positions < 2:
        raise UserError(f"--max_positions={max_positions}; use 2 or more")
    sides = [find_side(workdir), find_side(against)]
    first, second = (side.model for side in sides)
    for key in ("num_layers", "embed_dim"):
        ours, theirs = getattr(first, key), getattr(second, key)
        if ours != theirs:
            raise UserError(
                f"--against={against}: `model.{key}`={theirs} is not the {ours} of {workdir}; only models of equal "
                "depth and width can be compared"
            )
    coarsest = {
        path: min((side.types[path] for side in sides if path in side.types), key=_precision)
        for path in {path for side in sides for path in side.types}
    }
    rounds = [any(coarsest[path] != dtype for path, dtype in side.types.items()) for side in sides]
    common, inputs, measured = min(first.vocab_size, second.vocab_size), [], []
    for side, has_finer in zip(sides, rounds, strict=True):
        run = side.open()
        if not inputs:
            inputs = _inputs(sides, run, common, max_positions)
        measured.append(_measured(side, run, inputs, common, coarsest if has_finer else None))
        del run
    LOG.info("verify: comparing")
    exact = compare(measured[0][0], measured[1][0], inputs)
    rounded = compare(measured[0][1], measured[1][1], inputs) if any(rounds) else None
    coarser = {coarsest[path].name for side in sides for path, dtype in side.types.items() if dtype != coarsest[path]}
    types = " and ".join(sorted(coarser))
    equal, words = verdict(exact, rounded, types)
    settings = [*_settings(first, second), *(words for side in sides for words in _kept(side))]
    if jax.process_index() == 0:
        _show(exact, rounded, settings, sides, f"{words}; {exact.tokens} tokens compared")
    result = _result(exact, rounded, sides, settings) | {"equal": equal, "verdict": words}
    return result | (_write(result, exact, rounded, pathlib.Path(out).expanduser()) if out else {})


def _inputs(sides: list[Side], run: Run, common: int, max_positions: int) -> list[Input]:
    """The tokens that both read, made for whichever of them needs longer rows."""
    most = min(max_positions, *(side.model.max_positions for side in sides))
    model = max((side.model for side in sides), key=lambda model: long_length(model, most))
    length, threshold = long_length(model, most)
    if length <= threshold:
        LOG.warning(
            "verify: long rows of %d tokens do not go past the %d behind which windows or ropes change; "
            "raise --max_positions", length, threshold,
        )  # fmt: skip
    return make_inputs(model, common, run.mesh, most, SEED)


def _measured(
    side: Side, run: Run, inputs: list[Input], common: int, coarsest: Mapping[str, np.dtype] | None
) -> tuple[list[Measured], list[Measured]]:
    """A side as it is, and with its weights in coarser types where any is named. Its weights are gone then."""
    params = {name: value for name, value in run.params.items() if name != "predictors"}
    if run.config.lora.rank:
        with jax.set_mesh(run.mesh):
            params = jax.jit(merged, donate_argnums=0)(params)
    model = run.config.model

    def progress(name: str) -> None:
        LOG.info("verify: %s: %s tokens", side.name, name)

    plain = measure(params, model, run.mesh, inputs, common, progress)
    if coarsest is None:
        return plain, plain
    LOG.info("verify: %s: again with its weights rounded as the other's are", side.name)
    params = jax.tree_util.tree_map_with_path(functools.partial(_round, coarsest), params)
    return plain, measure(params, model, run.mesh, inputs, common)


def _round(types: Mapping[str, np.dtype], entries: Any, leaf: jax.Array) -> jax.Array:
    """One parameter in its coarser type; the old one is freed, so that the model is never held twice."""
    dtype = types.get(_path(entries), leaf.dtype)
    if _precision(dtype) >= _precision(leaf.dtype):
        return leaf
    rounded = jax.block_until_ready(leaf.astype(dtype))
    leaf.delete()
    return rounded


def _settings(first: ModelConfig, second: ModelConfig) -> list[str]:
    """Keys of the model that differ and may explain what is found."""
    theirs = flatten(to_dict(second))
    return [
        f"`model.{key}` is {value} and {theirs[key]}"
        for key, value in flatten(to_dict(first)).items()
        if value != theirs[key] and key not in (*OWN_KEYS, "vocab_size", "vocab_multiple")
    ]


def _kept(side: Side) -> list[str]:
    """That a run computes with codes, which its exports do not carry over."""
    if side.run is None or not side.run.lora.is_quantized:
        return []
    return [f"{side.name} keeps its frozen weights in {side.run.lora.base_dtype}; exports have the exact ones"]


def _vocabularies(sides: list[Side]) -> str:
    first, second = (side.model.vocab_size for side in sides)
    if first == second:
        return ""
    return f"{first} and {second} rows of the vocabulary: the first {min(first, second)} are compared"


def _show(exact: Comparison, rounded: Comparison | None, settings: list[str], sides: list[Side], last: str) -> None:
    """The table by layer, that by input, what differs besides, and the verdict."""
    console = Console()
    table = Table("layer", "largest difference", "relative RMS", *(["both rounded"] if rounded else []))
    seconds = rounded.layers if rounded else exact.layers
    for layer, other in zip(exact.layers, seconds, strict=True):
        numbers = [layer.max_abs, layer.relative, *([other.relative] if rounded else [])]
        style = "bold red" if other.departs else ("" if layer.departs else "green")
        table.add_row(layer.name, *(f"{number:.2e}" for number in numbers), style=style)
    console.print(table)
    table = Table("tokens", "length", "logits differ by", "KL mean, nats", "KL max", "same top token")
    for name, scores in exact.inputs.items():
        numbers = [f"{scores[key]:.2e}" for key in ("logit_max_abs", "kl_mean", "kl_max")]
        table.add_row(name, f"{scores['length']}", *numbers, f"{scores['top1_agreement']:.2%}")
    console.print(table)
    for line in [_vocabularies(sides), *settings, last]:
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _result(exact: Comparison, rounded: Comparison | None, sides: list[Side], settings: list[str]) -> dict[str, Any]:
    first = (rounded or exact).first_departing
    names = ("hidden_relative_rms", "logit_max_abs", "kl_mean", "kl_max", "top1_agreement")
    numbers = {name: _number(exact.worst(name)) for name in names}
    sizes = [side.model.vocab_size for side in sides]
    return {
        "first_departing": first.name if first else None,
        **numbers,
        "tokens": exact.tokens,
        "vocabulary_rows": {"workdir": sizes[0], "against": sizes[1], "compared": min(sizes)},
        "settings_that_differ": settings,
        "workdir": sides[0].name,
        "against": sides[1].name,
    }


def _number(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None


def _write(result: dict[str, Any], exact: Comparison, rounded: Comparison | None, out: pathlib.Path) -> dict[str, str]:
    """`verify.json` with every number, and `verify.png`."""
    if jax.process_index():
        return {}
    import matplotlib

    from llm_jepa_jax.analysis.plots import STYLE, departures  # a second of imports, wanted only here

    out.mkdir(parents=True, exist_ok=True)
    every = {"as they are": exact} | ({"both rounded": rounded} if rounded else {})
    details = {
        label: {
            "layers": [{key: value if key == "name" else _number(value) for key, value in layer._asdict().items()}
                       for layer in comparison.layers],
            "inputs": {name: {key: _number(value) for key, value in scores.items()}
                       for name, scores in comparison.inputs.items()},
        }
        for label, comparison in every.items()
    }  # fmt: skip
    (out / "verify.json").write_text(json.dumps(result | details, indent=2) + "\n")
    hidden = {label: [layer.relative for layer in comparison.layers[:-1]] for label, comparison in every.items()}
    with matplotlib.rc_context(STYLE):
        departures([layer.name for layer in exact.layers[:-1]], hidden, HIDDEN_TOLERANCE).savefig(out / "verify.png")
    return {"picture": str(out / "verify.png"), "numbers": str(out / "verify.json")}
