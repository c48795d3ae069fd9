# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: claimed by training, opened by everything else."""

import dataclasses
import functools
import json
import logging
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jepa_jax.analysis.model_card import CardFacts, card_files
from llm_jepa_jax.checkpoint.companions import companions, kept_rows
from llm_jepa_jax.checkpoint.export_settings import PREDICTOR_ROWS, ExportSettings
from llm_jepa_jax.checkpoint.frozen import exact_weight, fingerprint, frozen_parameters
from llm_jepa_jax.checkpoint.hf_directory import HfCheckpoint, is_published, open_directory
from llm_jepa_jax.checkpoint.hf_export import export
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.checkpoint.hub import cached_directory
from llm_jepa_jax.checkpoint.initial import open_initial
from llm_jepa_jax.checkpoint.manager import restore_params
from llm_jepa_jax.checkpoint.peft import open_adapter, read_adapter, with_adapter, write_adapter
from llm_jepa_jax.checkpoint.places import Place, absolute, is_url, on_this_machine, place, run_place
from llm_jepa_jax.checkpoint.workdir import Workdir
from llm_jepa_jax.config import Config, DataConfig, InitConfig, MeshConfig, TrainConfig, freeze, to_dict
from llm_jepa_jax.data.sources import Splits
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.from_json import load_json
from llm_jepa_jax.lora_config import LoraConfig
from llm_jepa_jax.models.lora import joined
from llm_jepa_jax.objective_config import JepaConfig, ObjectiveConfig
from llm_jepa_jax.objectives.parameters import abstract_parameters
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import parameter_shardings, placed
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.schema import flatten
from llm_jepa_jax.text.checkpoint_files import CHECKPOINT_DIRECTORY, write_whole
from llm_jepa_jax.text.tokenizer import MODEL_FILE, Tokenizer, has_tokenizer, load_tokenizer, saved_tokenizer
from llm_jepa_jax.vocabulary import padded

LOG = logging.getLogger("llm_jepa_jax")
FILES = ("config.json", "run.json", "checkpoints")
RESUMABLE = (
    "train",
    "eval",
    "log",
    "checkpoint",
    "mesh",
    "model.vocab_multiple",
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "data.max_dropped_share",
)
"""Keys and sections that a resumed run may change; everything else is what the run is."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its tokenizer, on a mesh."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer | None
    """None: a published model that comes without one."""
    step: int
    params: Any
    system: str
    """The system turn that the run's evaluation records begin with, or an empty string."""

    workdir: Place | None = None
    """The run's directory; None: a published model, as it came."""

    @property
    def published(self) -> Place | None:
        """The directory of the published model that the weights come from, if it is one and is there."""
        name = self.config.init.checkpoint
        directory = place(name) if is_url(name) else cached_directory(name) if name else None
        return directory if directory and is_published(directory) else None


def check_directory(workdir: Workdir, config: Config, splits: Splits) -> None:
    """Makes the run directory if it is not there; a run in it must be this one.

    Raises:
        UserError: it cannot be written, or it holds a run of another configuration or other data.
    """
    workdir.check_writable()
    if (workdir.files / "config.json").exists():
        _check_same_run(workdir.files, config, _facts(config, splits))


def claim(workdir: Workdir, config: Config, tokenizer: Tokenizer, splits: Splits) -> None:
    """Writes what makes a checked directory this run's: once its data are known to be good."""
    if jax.process_index() == 0:
        workdir.clean()
        tokenizer.save(workdir.files)
        for name, values in (("run.json", _facts(config, splits)), ("config.json", to_dict(config))):
            write_whole(workdir.files / name, (json.dumps(values, indent=2) + "\n").encode())
        workdir.upload()


def _facts(config: Config, splits: Splits) -> dict[str, str | int]:
    records = (splits.eval[i] for i in range(len(splits.eval)))
    first = next((record.messages[0] for record in records if record.messages), None)
    return {
        "system": first.content if first and first.role == "system" else "",
        "train_records": len(splits.train),
        "eval_records": len(splits.eval),
        "train_hash": splits.train.content_hash,
        "eval_hash": splits.eval.content_hash,
    } | ({"base": fingerprint(config)} if config.lora.rank else {})


def _check_same_run(workdir: pathlib.Path, config: Config, facts: dict[str, str | int]) -> None:
    before = flatten(load_json(workdir / "config.json").to_dict())
    for key, value in flatten(to_dict(config)).items():
        fixed = not any(key == name or key.startswith(name + ".") for name in RESUMABLE)
        if key == "init.checkpoint" and facts.get("base"):
            continue  # the same weights may lie elsewhere
        if fixed and before[key] != value:
            raise UserError(
                f"{workdir}: holds a run with `{key}`={before[key]!r}, not {value!r}; "
                f"set --config.{key}={before[key]} to go on with it, or take another --workdir"
            )
    saved = json.loads((workdir / "run.json").read_text())
    for name, key in (("train_hash", "data.train"), ("eval_hash", "data.eval")):
        if saved[name] != facts[name]:
            raise UserError(
                f"{workdir}: the records of `{key}` are not those the run began with; "
                "bring the old file back, or take another --workdir"
            )
    _check_base(workdir, config, saved, facts.get("base"))


def _check_base(workdir: pathlib.Path, config: Config, saved: dict[str, str], base: str | None) -> None:
    if saved.get("base") != base:
        raise UserError(
            f"{workdir}: its adapters were trained beside other weights than those of `init.checkpoint`="
            f"{config.init.checkpoint}; set --config.init.checkpoint to where they lie"
        )


def abstract_trained(config: Config, mesh: Mesh) -> Any:
    """What a run trains, as `jax.ShapeDtypeStruct`s with their shardings."""
    shapes, axes = abstract_parameters(config)
    return placed(shapes, parameter_shardings(mesh, axes))


def on_all_devices(config: Config) -> Config:
    """A run's configuration for reading its model on whatever devices there are, which share its width."""
    tile = config.lora.tile_size if config.lora.is_quantized else 1  # is not cut
    mesh = MeshConfig(fsdp=math.gcd(config.model.embed_dim // tile, jax.device_count()))
    data = dataclasses.replace(config.data, rows_per_step=jax.device_count())
    return dataclasses.replace(config, mesh=mesh, data=data, train=dataclasses.replace(config.train, micro_batches=1))


def open_run(workdir: Place, config: Config | None = None, step: int | None = None) -> Run:
    """Opens a checkpoint of a run directory, the newest without `step`; `config` (default: its own config.json) may
    name another mesh.

    Raises:
        UserError: the directory is not that of a run, or no checkpoint can be read.
    """
    workdir = run_place(workdir)
    for name in FILES:
        if not (workdir / name).exists():
            raise UserError(f"{workdir}: has no {name}; a run directory holds {', '.join(FILES)}")
    tokenizer = saved_tokenizer(on_this_machine(workdir))
    if tokenizer is None:
        raise UserError(f"{workdir}: has no {MODEL_FILE} and no {CHECKPOINT_DIRECTORY}/; a run directory holds one")
    saved = freeze(load_json(workdir / "config.json"))
    config = config or saved
    config = dataclasses.replace(config, lora=saved.lora)  # settled only there
    if config.lora.rank:
        init = dataclasses.replace(saved.init, checkpoint=config.init.checkpoint or saved.init.checkpoint)
        config = dataclasses.replace(config, init=init, seed=saved.seed)
    mesh = make_mesh(config.mesh)
    model = padded(saved.model, mesh.shape["tensor"])  # its vocabulary size is known only there
    config = dataclasses.replace(config, model=model)
    config = resolve(config, mesh.shape)
    abstract = abstract_trained(config, mesh)
    facts = json.loads((workdir / "run.json").read_text())
    if config.lora.rank:
        _check_base(workdir, config, facts, _base_of(workdir, config))
    step, params = restore_params(workdir / "checkpoints", abstract, step)
    if config.lora.rank:
        params = joined(params, frozen_parameters(config, mesh))
    return Run(config, mesh, tokenizer, step, params, facts["system"], workdir)


def _base_of(workdir: Place, config: Config) -> str:
    try:
        return fingerprint(config)
    except UserError as error:
        raise UserError(
            f"{workdir}: its adapters need the weights that they were trained beside; set --config.init.checkpoint to "
            f"where they lie now ({error})"
        ) from error


def open_published(directory: Place, adapter: pathlib.Path | None = None) -> Run:
    """Opens the directory of a published model on all devices, with what they share of its width, and with a PEFT
    adapter if one is named.

    Its weights keep their type where it is bfloat16, and are computed with in float32.

    Raises:
        UserError: a file is missing or damaged, or the model or the adapter is not supported.
    """
    checkpoint = open_directory(directory)
    mesh = make_mesh(MeshConfig(fsdp=math.gcd(checkpoint.model.embed_dim, jax.device_count())))
    files = on_this_machine(directory)
    tokenizer = load_tokenizer(files) if has_tokenizer(files) else None
    known = tokenizer is not None and tokenizer.predictor_ids[0] < checkpoint.model.vocab_size
    if tokenizer is not None and not known:
        LOG.warning(
            "%s: the weights have no rows for predictor tokens, so both views are encoded without (k = 0); "
            "a run that starts from them with `init.checkpoint` learns such rows", directory,
        )  # fmt: skip
    config = Config(
        objective=ObjectiveConfig(jepa=JepaConfig(num_predictors=int(known))),
        data=DataConfig(rows_per_step=mesh.size),
        init=InitConfig(checkpoint=str(absolute(directory))),
        model=checkpoint.model,
        train=TrainConfig(param_dtype=checkpoint.dtype),
    )
    if adapter:
        train = TrainConfig(param_dtype="float32")
        lora = LoraConfig(adapter=str(adapter.absolute()), base_dtype=checkpoint.dtype)
        config = with_adapter(dataclasses.replace(config, lora=lora, train=train), checkpoint.model)
    config = resolve(config, mesh.shape)
    if adapter:
        trained = read_adapter(open_adapter(adapter, checkpoint.model), abstract_trained(config, mesh))
        params = joined(trained, frozen_parameters(config, mesh))
    else:
        params = read_parameters(checkpoint, mesh, checkpoint.dtype, checkpoint.model.padded_vocab_size)
    return Run(config, mesh, tokenizer, 0, params, "")


def export_run(run: Run, directory: Place, settings: ExportSettings, predictor_rows: str = "keep") -> int:
    """Writes a run's model as a published one, with its tokenizer, generation settings and a model card.

    With `predictor_rows="drop"`, rows of predictor tokens that the checkpoint did not have are left out, and the
    tokenizer's files are the checkpoint's; with `"keep"` the tokenizer knows them. See `hf_export.export`.
    """
    if predictor_rows not in PREDICTOR_ROWS:
        raise UserError(f"predictor_rows={predictor_rows!r}; use {' or '.join(PREDICTOR_ROWS)}")
    config, tokenizer, source = run.config, run.tokenizer, run.published
    rows = kept_rows(config.model.vocab_size, tokenizer, source, predictor_rows)
    if predictor_rows == "drop" and rows == config.model.vocab_size:
        LOG.info(
            "export: predictor tokens have no rows beyond the checkpoint's, or the tokenizer's own; none is dropped"
        )
    with_new = bool(
        run.workdir and predictor_rows == "keep" and tokenizer and max(tokenizer.new_ids, default=rows) < rows
    )
    beside = companions(tokenizer, source, with_new)
    dtype = settings.dtype or run.params["embedding"].dtype.name
    exported = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))
    card = card_files(CardFacts(exported, run.step, run.workdir, source, tokenizer, dtype, with_new))
    settings = dataclasses.replace(
        settings, num_tokens=rows, token_ids=beside.token_ids, files=beside.files | card
    )  # fmt: skip
    params = {name: value for name, value in run.params.items() if name != "predictors"}
    exact = functools.partial(exact_weight, config, run.mesh)
    return export(params, config.model, run.mesh, directory, settings, exact)


def export_adapter(run: Run, directory: Place) -> int:
    """Writes a run's adapters for PEFT; see `peft.write_adapter`.

    Raises:
        UserError: the run has none, or not beside a published model, or the directory is not new.
    """
    if not run.config.lora.rank:
        raise UserError("--format=peft: the run trained all weights, not adapters; use --format=merged")
    if is_url(directory):
        raise UserError(f"{directory}: adapters are written to a directory here; copy it from there")
    start = open_initial(run.config)
    if start is None or not isinstance(start.source, HfCheckpoint):
        raise UserError(
            "--format=peft: the adapters lie beside a run's weights or random ones, which PEFT cannot open; "
            "use --format=merged"
        )
    known, name = start.model.vocab_size, run.config.init.checkpoint
    if run.config.model.vocab_size > known:
        LOG.warning(
            "the adapter holds an embedding of %d tokens, the base has %d: before it is loaded, "
            "base.resize_token_embeddings(%d)", run.config.model.vocab_size, known, run.config.model.vocab_size,
        )  # fmt: skip
    return write_adapter(run.params, run.config, run.mesh, directory, name, known)
