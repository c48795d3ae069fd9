# SPDX-License-Identifier: Apache-2.0
"""Models that the command line names, `NAME=DIR`: runs, their checkpoints, published directories, ids of the hub."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from llm_jepa_jax.analysis.model_card import TRAINING
from llm_jepa_jax.checkpoint.hf_directory import is_published
from llm_jepa_jax.checkpoint.hub import is_hub_id
from llm_jepa_jax.checkpoint.manager import saved_steps
from llm_jepa_jax.checkpoint.places import Place, is_url, on_this_machine, place
from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.from_json import load_json
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.run_directory import FILES, Run, on_all_devices, open_published, open_run

LOG = logging.getLogger("llm_jepa_jax")
NAMED = re.compile(r"([^/=:]+)=(.+)")


@dataclasses.dataclass(frozen=True)
class Model:
    """One of those that are looked at, before its weights are read."""

    name: str
    directory: Place
    config: Config | None
    """Of a run; None: a published model."""
    step: int | None = None
    """Of the checkpoint; None: the newest."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a run knows of its records; nothing of a published model."""
        return json.loads((self.directory / "run.json").read_text()) if self.config else {}

    def open(self) -> Run:
        """Reads the weights, onto all devices.

        Raises:
            UserError: they cannot be read, or there is no tokenizer.
        """
        LOG.info("analyze: %s: reading the weights", self.name)
        if self.config:
            return open_run(self.directory, on_all_devices(self.config), self.step)
        run = open_published(self.directory)
        if run.tokenizer is None:
            raise UserError(f"{self.directory}: has weights but no tokenizer; put its files there")
        return run

    def jepa(self, run: Run) -> JepaConfig:
        """How the model was trained to read views. An export says so; other published models were not trained to."""
        card = on_this_machine(self.directory) / TRAINING
        if self.config or not card.is_file():
            found = run.config.objective.jepa
            return found if self.config else dataclasses.replace(found, weight=0.0, num_predictors=0)
        found = freeze(load_json(card)).objective.jepa
        known = run.config.objective.jepa.num_predictors  # none where the export has dropped their rows
        return found if known else dataclasses.replace(found, num_predictors=0)


def find_models(arguments: Sequence[str]) -> list[Model]:
    """What `--models` names, each a run's directory, one of its checkpoints, a published directory, or a hub id.

    Raises:
        UserError: one is none of these, or two have one name.
    """
    if not arguments:
        raise UserError("--mode=analyze: nothing to look at; pass --models=NAME=DIR, once for each model")
    models: list[Model] = []
    for argument in arguments:
        match = NAMED.fullmatch(argument)
        if match and not pathlib.Path(argument).exists():
            name, directory = match.groups()
        else:
            name, directory = "", argument
        model = _find(name, directory)
        if any(model.name == other.name for other in models):
            raise UserError(f"--models: two are called {model.name}; name one, as in --models=other={directory}")
        models.append(model)
    return models


def _find(name: str, given: str) -> Model:
    directory = place(given)
    own = given.rpartition("/")[2] if is_hub_id(given) else _name(directory)
    if is_published(directory):
        return Model(name or own, directory, None)
    step = None
    if own.isdigit() and directory.parent.name == "checkpoints":
        step, directory = int(own), directory.parent.parent
        own = f"{_name(directory)}@{own}"
    missing = [file for file in FILES if not (directory / file).exists()]
    if missing:
        raise UserError(
            f"--models={given}: {directory} has no {missing[0]}; name a run's directory ({', '.join(FILES)}), "
            "RUN/checkpoints/STEP, or a published model's"
        )
    if step is not None and step not in (steps := saved_steps(directory / "checkpoints")):
        raise UserError(f"--models={given}: no whole checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return Model(name or own, directory, freeze(load_json(directory / "config.json")), step)


def _name(directory: Place) -> str:
    return directory.name if is_url(directory) else directory.resolve().name
