# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: what was trained and how, what it scored, how to use it; from the run's own files."""

import dataclasses
import json
import pathlib
import shlex
from typing import Any

import llm_jepa_jax
from llm_jepa_jax.checkpoint.companions import licence_fields
from llm_jepa_jax.checkpoint.hub import is_hub_id
from llm_jepa_jax.checkpoint.places import Place
from llm_jepa_jax.config import Config, to_dict
from llm_jepa_jax.models.families.registry import family_of
from llm_jepa_jax.models.transformer import abstract_params, count_params
from llm_jepa_jax.objective_config import ObjectiveConfig
from llm_jepa_jax.schema import flatten, unflatten
from llm_jepa_jax.text.interface import Tokenizer

TRAINING = "training_config.json"
CACHES = ("data.cache_dir", "train.compile_cache")
OF_THE_MACHINE = (*CACHES, "mesh.", "log.")
"""Keys that say nothing of the model."""
PATHS = ("data.train", "data.eval", "text.tokenizer", "text.chat_template", "init.checkpoint")
"""Keys that name files, of which a card shows the names alone."""
LAST_METRICS = ("ntp_loss", "jepa_loss", "stp_loss", "cos_pair", "cos_shuffled", "rank_text", "rank_code")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is written from."""

    config: Config
    """With the rows of the vocabulary that the export has."""
    step: int
    workdir: Place | None
    """The run's directory; None: the weights are a published model's, as they came."""
    source: Place | None
    """The directory of the published model that training started from, if it is one and is at hand."""
    tokenizer: Tokenizer | None
    dtype: str
    """Of the weights."""
    with_new: bool
    """The export has the rows of tokens that were added in training, and its tokenizer knows them."""

    @property
    def base(self) -> str:
        """What the weights started from, without the path to it; may be empty."""
        return _named("init.checkpoint", self.config.init.checkpoint)


def card_files(facts: CardFacts) -> dict[str, bytes]:
    """`README.md`, and `training_config.json` of a run: its configuration, without paths of the machine."""
    files = {"README.md": _card(facts).encode()}
    if facts.workdir:
        flat = {key: _named(key, value) for key, value in flatten(to_dict(facts.config)).items()}
        shown = {key: value for key, value in flat.items() if not key.startswith(CACHES)}
        files[TRAINING] = (json.dumps(unflatten(shown), indent=2) + "\n").encode()
    return files


def _named(key: str, value: Any) -> Any:
    """A value with file names in place of paths; ids of the hub stay."""
    if key not in PATHS or not value:
        return value
    places = value.split(",") if key.startswith("data.") else [value]
    return ",".join(place if is_hub_id(place) else pathlib.PurePath(place).name for place in places)


def _card(facts: CardFacts) -> str:
    parts = [_front_matter(facts), _what(facts)]
    if facts.workdir:
        parts += [_training(facts, facts.workdir), _scores(facts, facts.workdir)]
    parts += [_use(), _embeddings(facts), _tokenizer(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> str:
    """YAML; JSON strings are YAML strings."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(facts.base)}"] if is_hub_id(facts.config.init.checkpoint) else []
    lines += licence_fields(facts.source)
    objective = facts.config.objective
    named = {"llm-jepa": objective.jepa.weight, "semantic-tube-prediction": objective.stp.weight}
    tags = ["llm_jepa_jax", *(name for name, weight in named.items() if weight and facts.workdir)]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what(facts: CardFacts) -> str:
    model = facts.config.model
    count = count_params(abstract_params(dataclasses.replace(model, vocab_multiple=1), facts.dtype)[0])
    start = f"`{facts.base}`" if facts.base else "random weights"
    version = f"llm_jepa_jax {llm_jepa_jax.__version__}"
    how = f"trained from {start} with {version}" if facts.workdir else f"{start} as it is, written by {version}"
    name = f"{pathlib.PurePath(facts.base).name or 'A language model'}"
    title = f"{name} trained with {_title(facts.config.objective)}" if facts.workdir else name
    return (
        f"# {title}\n\nA causal language model {how}: {count:,} parameters, family `{family_of(model).model_type}`, "
        f"{model.num_layers} layers of width {model.embed_dim}, {model.vocab_size:,} tokens, up to "
        f"{model.max_positions:,} positions, weights in {facts.dtype}."
    )


def _title(objective: ObjectiveConfig) -> str:
    names = {"next-token prediction": objective.ntp, "LLM-JEPA": objective.jepa, "STP": objective.stp}
    return " and ".join(name for name, term in names.items() if term.weight) or "llm_jepa_jax"


def _objectives(config: Config) -> list[str]:
    """A line for every loss that is on."""
    o, jepa = config.objective, config.objective.jepa
    lines = []
    if o.ntp.weight:
        lines.append(f"next-token prediction on {o.ntp.targets} tokens, γ = {o.ntp.weight:g}")
    if jepa.weight:
        lines.append(
            f"LLM-JEPA ([arXiv 2509.14252](https://arxiv.org/abs/2509.14252)): λ = {jepa.weight:g}, "
            f"k = {jepa.num_predictors}, distance {jepa.distance}, {jepa.direction.replace('_', ' ')}, layout "
            f"{config.data.layout}, loss dropout α = {jepa.dropout:g} by {jepa.dropout_by}"
        )
    if o.stp.weight:
        lines.append(
            "semantic tube prediction ([arXiv 2602.22617](https://arxiv.org/abs/2602.22617)): "
            f"weight {o.stp.weight:g}, mode {o.stp.mode}, distance {o.stp.distance}"
        )
    for name, term in (("VICReg", o.vicreg), ("SIGReg", o.sigreg)):
        lines += [f"{name} on the views' embeddings: weight {term.weight:g}"] if term.weight else []
    return lines


def _training(facts: CardFacts, workdir: Place) -> str:
    config, record = facts.config, _json(workdir / "run.json")
    rows = [("steps", f"{facts.step:,}")]
    rows += [("epochs", f"{config.train.num_epochs}")] if config.train.num_epochs and not config.train.num_steps else []
    for key, name in (("train", "training data"), ("eval", "evaluation data")):
        said = _named(f"data.{key}", getattr(config.data, key))
        count = record.get(f"{key}_records")
        counted = f"{count:,} records" if count is not None else ""
        rows += [(name, ": ".join(part for part in (f"`{said}`" if said else "", counted) if part))]
    rows += [
        ("rows a step", f"{config.data.rows_per_step} of {config.data.row_length} tokens"),
        ("optimizer", f"AdamW, peak learning rate {config.opt.learning_rate:g}, {config.opt.schedule} schedule"),
        ("compute type", config.train.dtype),
        ("seed", str(config.seed)),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])
    return (
        "## Training\n\n" + "\n".join(f"- {line}" for line in _objectives(config)) + f"\n\n{table}\n\n"
        f"What differs from the defaults, as flags of the command line:\n\n```\n{_overrides(config)}\n```\n\n"
        f"Every key is in [{TRAINING}]({TRAINING})."
    )


def _overrides(config: Config) -> str:
    """The keys that differ from the defaults; the model's own are the checkpoint's where there is one."""
    defaults = flatten(to_dict(Config()))
    skipped = (*OF_THE_MACHINE, *(["model."] if config.init.checkpoint else []))
    changed = {
        key: _named(key, value)
        for key, value in flatten(to_dict(config)).items()
        if value != defaults[key] and not key.startswith(skipped)
    }
    return "\n".join(f"--config.{key}={shlex.quote(str(value))}" for key, value in changed.items()) or "(nothing)"


def _scores(facts: CardFacts, workdir: Place) -> str:
    """The newest evaluation of every task up to the exported step, and the last metrics of training."""
    newest: dict[str, tuple[int, Place]] = {}
    for path in (workdir / "eval").glob("*-*.json"):
        task, _, step = path.stem.rpartition("-")
        if step.isdigit() and newest.get(task, (-1,))[0] < int(step) <= facts.step:
            newest[task] = int(step), path
    rows = []
    for task, (step, path) in sorted(newest.items()):
        score = _json(path)
        unit, factor = ("%", 100) if score["share"] else ("", 1)
        value, low, high = (f"{factor * score[name]:.1f}" for name in ("value", "low", "high"))
        rows.append((task, f"{value}{unit} of {score['asked']:,} examples (95%: {low} to {high})", step))
    metrics = [line for line in _lines(workdir / "metrics.jsonl") if line["step"] <= facts.step]
    for name in LAST_METRICS:
        found = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
        rows += [(f"{name} (training)", f"{found[-1][1]:.4g}", found[-1][0])] if found else []
    if not rows:
        return ""
    table = ["| | | step |", "|---|---|---|", *(f"| {name} | {value} | {step:,} |" for name, value, step in rows)]
    return "## Scores\n\n" + "\n".join(table)


def _use() -> str:
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
```

or `llm_jepa_jax.load(DIRECTORY)`, whose `encode` gives the embeddings below."""


def _embeddings(facts: CardFacts) -> str:
    jepa, tokenizer = facts.config.objective.jepa, facts.tokenizer
    if not (facts.workdir and jepa.weight and tokenizer):
        return ""
    other = {"text": "code", "code": "text"}[jepa.source]
    layer = "of the last layer" if jepa.layer in (-1, facts.config.model.num_layers) else f"of layer {jepa.layer}"
    norm = "after the final norm" if jepa.final_norm else "without the final norm"
    ids = tokenizer.predictor_ids[: 1 if jepa.shared_predictor else jepa.num_predictors]
    known = facts.with_new or not tokenizer.new_ids
    where = {"append": "behind its content", "prepend": "before its content"}[jepa.placement]
    read = {"last": "the state at its end", "mean": "the mean of the states up to its end"}[jepa.pooling]
    end = {"content": "the last token of content or predictors", "turn": "the token that ends the turn"}[jepa.view_end]
    offset = f", {jepa.view_end_offset} tokens before it" if jepa.view_end_offset else ""
    named = f"(ids {', '.join(map(str, ids))})" if known else "(left out here)"
    predictors = (
        f"k = {jepa.num_predictors} predictor tokens {named} {where}" if jepa.num_predictors else "no predictors"
    )
    return (
        f"## Embeddings\n\nThe {jepa.source} view (a turn of its own) has {predictors}; the {other} view has none. An "
        f"embedding is {read}, {layer}, {norm}; a view ends with {end}{offset}."
    )


def _tokenizer(facts: CardFacts) -> str:
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return ""
    new = tokenizer.new_ids
    if not facts.workdir:
        said = "The files are the checkpoint's."
    elif not new:
        said = "Predictor tokens are tokens of the vocabulary; the files are as training used them."
    elif facts.with_new:
        said = f"Ids {min(new)} to {max(new)} are predictor tokens, added in training; the files know them."
    else:
        said = (
            "Predictor tokens were added in training; this export leaves them out, and the files are the checkpoint's."
        )
    return f"## Tokenizer\n\n{said}"


def _json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
