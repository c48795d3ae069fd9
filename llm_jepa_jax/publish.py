# SPDX-License-Identifier: Apache-2.0
"""`--mode=export`: a run as a published model."""

from typing import Any

import ml_collections

from llm_jepa_jax.checkpoint.export_settings import ExportSettings
from llm_jepa_jax.checkpoint.places import Place, new_place
from llm_jepa_jax.config import freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.run_directory import export_adapter, export_run, open_run


def export(
    values: ml_collections.ConfigDict,
    workdir: Place,
    out: str,
    settings: ExportSettings,
    predictor_rows: str,
    form: str,
) -> dict[str, Any]:
    """Writes the newest checkpoint of a run as a published model, or its adapters alone (`form`: `peft`); see
    `run_directory.export_run` and `export_adapter`."""
    if not out:
        raise UserError("--mode=export: no directory to write; pass --out=DIR")
    run = open_run(workdir, freeze(values))
    if form == "peft":
        files = export_adapter(run, new_place(out))
    else:
        files = export_run(run, new_place(out), settings, predictor_rows)
    return {"step": run.step, "out": out, "weight_files": files, "workdir": str(workdir)}
