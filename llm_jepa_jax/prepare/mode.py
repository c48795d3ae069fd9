# SPDX-License-Identifier: Apache-2.0
"""`--mode=prepare`: data sets to JSONL, and JSONL to tokenised shards. Nothing here starts JAX's devices."""

import pathlib
from typing import Any

from absl import flags

from llm_jepa_jax.config import freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.any_dataset import prepare_columns
from llm_jepa_jax.prepare.published import prepare_dataset
from llm_jepa_jax.prepare.shards import prepare_shards

WAYS = (
    "--dataset=NAME (a published data set), --columns=PART=COLUMN,… (any table), or --shards=N (tokens of JSONL files)"
)


def prepare_from_flags(values: flags.FlagValues) -> dict[str, Any]:
    """Does what the command line says; its last line of output.

    Raises:
        UserError: flags that contradict each other, or a wrong source.
    """
    given = [name for name in ("dataset", "columns", "shards") if values[name].value]
    if len(given) != 1:
        raise UserError(f"--mode=prepare: {'pass one of' if not given else 'pass only one of'} {WAYS}")
    if values["processes"].present and given != ["shards"]:
        raise UserError("--processes: belongs to --shards; JSONL is written by one process")
    config = freeze(values.config)
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser()
    out = pathlib.Path(values.out or pathlib.Path("data") / (values.dataset or given[0])).expanduser()
    if given == ["dataset"]:
        return prepare_dataset(values.dataset, values.source, values.sha256, out, config.seed, cache_dir)
    if given == ["shards"]:
        if values.sha256:
            raise UserError("--sha256: belongs to --dataset and --columns; shards record the checksums of their files")
        return prepare_shards(config, values.source, values.shards, values.processes, out)
    return prepare_columns(values.source, values.columns, values.sha256, out, cache_dir)
