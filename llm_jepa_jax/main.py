# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m llm_jepa_jax.main --config=configs/NAME.py [--config.a.b=value …] [--mode=…]`."""

import dataclasses
import difflib
import errno
import json
import logging
import pathlib
import sys
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.logging import RichHandler

from llm_jepa_jax.checkpoint.export_settings import DTYPES, PREDICTOR_ROWS, SHARD_BYTES, ExportSettings
from llm_jepa_jax.checkpoint.quiet import quiet_failed_writes
from llm_jepa_jax.config import base_config
from llm_jepa_jax.errors import TRY_AGAIN, TryAgainError, UserError
from llm_jepa_jax.huge_pages import use_huge_pages

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
MODES = ("train", "eval", "generate", "export", "verify", "analyze", "inspect", "plan", "prepare")
FORMATS = ("merged", "peft")
USAGE = "python -m llm_jepa_jax.main --config=configs/NAME.py [--config.a.b=value …] [--mode=MODE] [--workdir=DIR]"
FLAGS_OF_MODES = {
    "prompt": ("generate",), "rows": ("inspect",), "out": ("export", "verify", "analyze", "eval", "prepare"),
    "against": ("verify",),
    "max_positions": ("verify",), "dtype": ("export",), "shard_bytes": ("export",), "predictor_rows": ("export",),
    "format": ("export",), "topology": ("plan",), "search": ("plan",), "compiles": ("plan",),
    "chip_hour_price": ("plan",), "examples_per_row": ("plan",), "longest_segment": ("plan",),
    "epoch_tokens": ("plan",), "verbose": ("plan",), "dataset": ("prepare",), "source": ("prepare",),
    "sha256": ("prepare",), "columns": ("prepare",), "shards": ("prepare",), "processes": ("prepare",),
    "models": ("analyze",), "data": ("analyze",), "examples": ("analyze",), "task": ("analyze",),
    "answers": ("analyze",), "umap": ("analyze",),
}  # fmt: skip
"""Flags that not every mode takes."""
WITHOUT_CONFIG = {
    "verify": "what is compared says what it is, and all devices are used",
    "analyze": "the models say what they are, and all devices are used",
}
"""Modes that take no `--config`, and why."""
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
LOG = logging.getLogger("llm_jepa_jax")


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """The flags of every mode."""
    config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py, configs/NAME.py:smoke, or a run's config.json", flag_values=values,
        sys_argv=argv,
    )  # fmt: skip
    flags.DEFINE_enum("mode", "train", MODES, "what to do", flag_values=values)
    flags.DEFINE_string("workdir", None, "directory of the run (train: default runs/NAME)", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "generate: a prompt; without any, lines of stdin", flag_values=values)
    flags.DEFINE_string(
        "out",
        "",
        "export, prepare, analyze: the directory to write; verify: where to put verify.png and verify.json; eval: "
        "where verdicts and result.json go, not to the run's eval/",
        flag_values=values,
    )
    flags.DEFINE_enum("dtype", "", ("", *DTYPES), "export: type of the weights; empty: as they are", flag_values=values)
    flags.DEFINE_integer("shard_bytes", SHARD_BYTES, "export: most bytes of a file", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "predictor_rows", "keep", PREDICTOR_ROWS,
        "export: rows of predictor tokens that the checkpoint did not have", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("against", "", "verify: the other model, a run's or a published directory", flag_values=values)
    flags.DEFINE_integer("max_positions", 10240, "verify: tokens of the longest sequence", flag_values=values)
    flags.DEFINE_enum(
        "format", "merged", FORMATS, "export: the whole model, or a run's adapters for PEFT", flag_values=values
    )
    flags.DEFINE_integer("rows", 3, "inspect: how many rows to show", lower_bound=1, flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several run as one", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many run as one", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all of them", lower_bound=1, flag_values=values)
    _define_plan_flags(values)
    _define_prepare_flags(values)
    _define_analyze_flags(values)
    flags.DEFINE_bool("debug", False, "show the stack trace of an error", flag_values=values)


def _define_plan_flags(values: flags.FlagValues) -> None:
    number, whole, yes = flags.DEFINE_float, flags.DEFINE_integer, flags.DEFINE_bool
    flags.DEFINE_string("topology", "", "plan: such as v5p:4x4x4, v6e:16x16, cpu:8, gpu:h100x64", flag_values=values)
    yes("search", True, "plan: choose mesh, micro-batches, remat and head chunk, not as configured", flag_values=values)
    whole("compiles", 2, "plan: programs that the search compiles", lower_bound=1, flag_values=values)
    number("chip_hour_price", 0.0, "plan: price of a chip-hour; 0: none", lower_bound=0.0, flag_values=values)
    number("examples_per_row", 8.0, "plan: conversations in a row that are assumed", flag_values=values)
    whole(
        "longest_segment", 0, "plan: tokens of the longest one; 0: twice the average", lower_bound=0, flag_values=values
    )
    yes("verbose", False, "plan: show where every array of the training state lies", flag_values=values)
    number("epoch_tokens", 1e9, "plan: tokens of the training set", lower_bound=1.0, flag_values=values)


def _define_prepare_flags(values: flags.FlagValues) -> None:
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    text("dataset", "", "prepare: a published data set, such as gsm8k; docs/data.md has all", flag_values=values)
    text(
        "source", "", "prepare: files, directories, archives or https addresses, with commas between",
        flag_values=values,
    )  # fmt: skip
    text("sha256", "", "prepare: checksum that the one file read must have", flag_values=values)
    text("columns", "", "prepare: a table's columns, such as text=question,code=query", flag_values=values)
    whole("shards", 0, "prepare: files of tokens to write, from the JSONL files of --source", 0, flag_values=values)
    whole("processes", 0, "prepare: processes that tokenise; 0: a core each", 0, flag_values=values)


def _define_analyze_flags(values: flags.FlagValues) -> None:
    text, yes = flags.DEFINE_string, flags.DEFINE_bool
    flags.DEFINE_multi_string(
        "models", [], "analyze: NAME=DIR of a run, RUN/checkpoints/STEP, or a published model; once for each, the one "
        "that answers are compared with before the other", flag_values=values,
    )  # fmt: skip
    text("data", "", "analyze: JSONL file; empty: the evaluation records of the runs", flag_values=values)
    flags.DEFINE_integer(
        "examples", 1000, "analyze: most records, and pairs, taken evenly", 10, 10_000, flag_values=values
    )
    text(
        "task", "", "analyze: whose answers are compared; empty: the first of the runs that judges", flag_values=values
    )
    yes("answers", False, "analyze: ask all models now, in place of reading what evaluation left", flag_values=values)
    yes("umap", False, "analyze: draw UMAP beside PCA and t-SNE (needs umap-learn)", flag_values=values)


def _config_argument(argv: list[str]) -> str | None:
    """The value of `--config`, whichever way it is spelled."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            return value if equals else (argv[position + 1] if position + 1 < len(argv) else None)
    return None


def _with_config_file(argv: list[str]) -> list[str]:
    """The arguments with `--config` as a Python file: JSON goes through `from_json.py`, a missing preset is refused.

    Without `--config`, a run's own `config.json` is taken where `--workdir` holds one and the mode is not train;
    `configs/tiny.py` otherwise.
    """
    given = _config_argument(argv)
    bare = next((mode for mode in WITHOUT_CONFIG if any(a.lstrip("-") == f"mode={mode}" for a in argv)), None)
    if bare and any(a.lstrip("-").startswith("config") for a in argv):
        raise UserError(f"--mode={bare}: takes no --config; {WITHOUT_CONFIG[bare]}")
    if bare:
        return [argv[0], f"--config={REPOSITORY / 'configs' / 'tiny.py'}", *argv[1:]]
    if given is None:
        workdir = next((a.partition("=")[2] for a in argv if a.lstrip("-").startswith("workdir=")), "")
        saved = _directory_here(workdir) / "config.json"
        training = not any(a.lstrip("-").startswith("mode=") and not a.endswith("=train") for a in argv)
        if workdir and not training and not saved.is_file():
            raise UserError(f"--workdir={workdir}: holds no run (no config.json); train one there or name another")
        given = str(saved) if workdir and not training else str(REPOSITORY / "configs" / "tiny.py")
        argv = [argv[0], f"--config={given}", *argv[1:]]
    path = given.partition(":")[0]
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={given}: no such file; pass a preset such as configs/tiny.py or a run's config.json")
    if not path.endswith(".json"):
        return argv
    loader = pathlib.Path(__file__).with_name("from_json.py")
    replaced = []
    for argument in argv:
        replaced.append(f"--config={loader}:{given}" if argument.lstrip("-") == f"config={given}" else argument)
    return [str(loader) + ":" + given if argument == given else argument for argument in replaced]


def _directory_here(workdir: str) -> pathlib.Path:
    """The run's directory, or a copy of its small files."""
    if "://" not in workdir:
        return pathlib.Path(workdir).expanduser()
    from llm_jepa_jax.checkpoint.places import on_this_machine, run_place  # a second of imports

    return on_this_machine(run_place(workdir))


def _unknown_key(argv: list[str]) -> str:
    """The first key of the command line that the schema does not have, and what it has there; empty: it has all."""
    for argument in argv:
        path = argument.lstrip("-").partition("=")[0]
        node: Any = base_config()
        for name in path.split(".")[1:] if path.startswith("config.") else ():
            if not isinstance(node, ml_collections.ConfigDict):
                return f"--{path}: there are no keys below a value; leave `.{name}` out"
            if name not in node:
                near = difflib.get_close_matches(name, list(node), 1)
                words = f"did you mean {near[0]}? " if near else ""
                return f"--{path}: unknown key `{name}`; {words}keys there are {', '.join(sorted(node))}"
            node = node[name]
    return ""


def parse(argv: list[str]) -> flags.FlagValues:
    """Parses the arguments (program name first).

    Raises:
        UserError: an unknown flag, mode or configuration key, or a value of the wrong type.
    """
    given = _config_argument(argv) or "configs/tiny.py"
    argv = _with_config_file(argv)
    values = flags.FlagValues()
    define_flags(values, argv)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, TypeError, ValueError, KeyError) as error:
        words = " ".join(str(error).replace("\n", " ").split())
        raise UserError(f"command line: {_unknown_key(argv) or f'{words}; usage: {USAGE}'}") from error
    if len(rest) > 1:
        raise UserError(f"command line: unexpected {rest[1]!r}; usage: {USAGE}")
    for name, modes in FLAGS_OF_MODES.items():
        if values[name].present and values.mode not in modes:
            raise UserError(f"command line: --{name} belongs to --mode={' or '.join(modes)}, not to {values.mode}")
    if values.mode == "verify" and not values.workdir:
        raise UserError("--mode=verify: pass --workdir=DIR and --against=DIR (a run's or a published model's)")
    if values.mode == "analyze" and values.workdir:
        raise UserError(f"--mode=analyze: takes no --workdir; pass --models={values.workdir} and --out=DIR")
    if values.workdir is None:
        values.workdir = str(pathlib.Path("runs") / _run_name(given))
    return values


def _run_name(config: str) -> str:
    """The default name of a run: `tiny`, `tiny-smoke`, or that of the run whose config.json is given."""
    path, _, argument = config.partition(":")
    if path.endswith(".json"):
        return pathlib.Path(path).absolute().parent.name
    return pathlib.Path(path).stem + (f"-{argument}" if argument else "")


def run(argv: list[str]) -> dict[str, object]:
    """Does what the arguments say and returns the result that `main` prints as its last line."""
    values = parse(argv)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read an absl flag
    if values.mode == "plan":
        return _plan(values)
    if values.mode == "prepare":
        from llm_jepa_jax.prepare.mode import prepare_from_flags  # as little as it needs, in each of its processes

        return prepare_from_flags(values)
    from llm_jepa_jax.parallel.processes import joined  # JAX starts here, after wrong flags have been refused

    with joined(values.coordinator, values.num_processes, values.process_id, values.start_timeout):
        return _run_mode(values)


def _plan(values: flags.FlagValues) -> dict[str, object]:
    from llm_jepa_jax.checkpoint.workdir import opened  # without need of it, as `main --help` has none
    from llm_jepa_jax.plan.mode import plan_from_flags  # before JAX starts: it chooses the devices to describe

    with opened(values.workdir) as workdir:
        result = plan_from_flags(values, workdir.files)
        workdir.finish(values.config.checkpoint.retry_seconds)
    return result | {"picture": str(workdir.place / "plan.png")}


def _run_mode(values: flags.FlagValues) -> dict[str, object]:
    from llm_jepa_jax import analyze, modes, publish, verify  # as above
    from llm_jepa_jax.checkpoint.places import run_place
    from llm_jepa_jax.checkpoint.workdir import opened

    if values.mode == "verify":
        return verify.verify(values.workdir, values.against, values.out, values.max_positions)
    if values.mode == "analyze":
        names = [field.name for field in dataclasses.fields(analyze.Request)]
        return analyze.analyze(analyze.Request(**{name: values[name].value for name in names}))
    if values.mode == "train":
        with opened(values.workdir) as opened_workdir:
            return modes.train(values.config, opened_workdir)
    workdir = run_place(values.workdir)
    if values.mode == "eval":
        return modes.evaluate(values.config, workdir, values.out)
    if values.mode == "generate":
        return modes.generate(values.config, workdir, values.prompt or [line.rstrip("\n") for line in sys.stdin])
    if values.mode == "export":
        settings = ExportSettings(values.dtype, values.shard_bytes)
        return publish.export(values.config, workdir, values.out, settings, values.predictor_rows, values.format)
    return modes.inspect(values.config, workdir, values.rows)


def main() -> None:
    """Runs; wrong input and a machine that refuses (no room, no permission) print one line and exit with code 2.

    Processes that are missing or gone exit with code 75: the same command may work. Models that `--mode=verify` finds
    to differ exit with code 1.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log_handler()])
    LOG.setLevel(logging.INFO)
    quiet_failed_writes()
    try:
        result = run(sys.argv)
    except (UserError, TryAgainError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else TRY_AGAIN)
    except OSError as error:
        if "--debug" in sys.argv or error.errno not in MACHINE_ERRORS:
            raise
        print(
            f"error: {error.filename or 'a file of the run'}: {error.strerror}; mend it and start again",
            file=sys.stderr,
        )
        sys.exit(2)
    print(json.dumps(result), flush=True)
    if result.get("equal") is False:  # of --mode=verify
        sys.exit(1)


def log_handler() -> logging.Handler:
    """On a terminal coloured, elsewhere plain lines."""
    if sys.stderr.isatty():
        return RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    return logging.StreamHandler()


if __name__ == "__main__":
    use_huge_pages()
    main()
