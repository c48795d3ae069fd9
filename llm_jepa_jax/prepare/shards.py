# SPDX-License-Identifier: Apache-2.0
"""JSONL files to tokenised shards, by several processes: `--mode=prepare --source=FILE,… --shards=N`."""

import concurrent.futures
import json
import logging
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.records import parse_records
from llm_jepa_jax.data.shard_files import FORMAT, IDENTITY, MADE, MANIFEST, inputs_hash, shard_name
from llm_jepa_jax.data.tokenized import VERSION
from llm_jepa_jax.errors import TryAgainError, UserError
from llm_jepa_jax.prepare.line_ranges import Input, Span, cut
from llm_jepa_jax.prepare.shard_writer import Job, Worker, kept, peak_rss_mib
from llm_jepa_jax.text.checkpoint_files import write_whole
from llm_jepa_jax.text.interface import Tokenizer
from llm_jepa_jax.text.tokenizer import cached_tokenizer, load_tokenizer

LOG = logging.getLogger("llm_jepa_jax")
_worker: Worker
"""Of a process that writes shards."""


def prepare_shards(config: Config, source: str, count: int, processes: int, out: pathlib.Path) -> dict[str, Any]:
    """Writes the records of JSONL files as tokens, and a manifest; shards that are there and whole are kept.

    Args:
        config: `data.pairs`, and what the tokenizer is (`text`, `init.checkpoint`).
        source: the files, with commas between.
        count: of shards.
        processes: that write at once; 0: one for each core.
        out: directory to write.

    Raises:
        UserError: a wrong file or line, or a directory that holds other shards.
        TryAgainError: a process was killed.
    """
    started = time.monotonic()
    paths = [pathlib.Path(part.strip()).expanduser() for part in source.split(",") if part.strip()]
    if not paths:
        raise UserError("--mode=prepare: --shards reads JSONL files; pass --source=train.jsonl")
    inputs, parts = cut(paths, count)
    tokenizer = _tokenizer(config, inputs, parts)
    identity = _identity(config, tokenizer, inputs, len(parts))
    _claim(out, identity)
    tokenizer.save(out)
    jobs = [Job(out, shard_name(number, len(parts)), spans) for number, spans in enumerate(parts)]
    found = {job.name: kept(job) for job in jobs}
    entries = {name: entry for name, entry in found.items() if entry}
    left = [job for job in jobs if job.name not in entries]
    if entries:
        LOG.info("%d of %d shards are there and whole", len(entries), len(jobs))
    (out / MANIFEST).unlink(missing_ok=True)
    peak = peak_rss_mib()
    for entry in _written(left, tokenizer, config.data.pairs, processes):
        peak = max(peak, entry.pop("peak_rss_mib"))
        entries[entry["name"]] = entry
        LOG.info("%s: %d records, %d tokens", entry["name"], entry["records"], entry["tokens"])
    seconds = time.monotonic() - started
    made = sum(entries[job.name]["tokens"] + entries[job.name]["view_tokens"] for job in left)
    return _finish(out, identity, [entries[job.name] for job in jobs]) | {
        "kept": len(jobs) - len(left), "seconds": round(seconds, 1), "tokens_per_s": round(made / seconds),
        "peak_rss_mib": peak, "out": str(out),
    }  # fmt: skip


def _identity(config: Config, tokenizer: Tokenizer, inputs: Sequence[Input], count: int) -> dict[str, Any]:
    """What a directory of shards is of; all that decides their content."""
    return {
        "made": MADE, "format": FORMAT, "rendering": VERSION, "pairs": config.data.pairs,
        "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
        "inputs": [{"file": str(i.path.absolute()), "bytes": i.size, "sha256": i.sha256} for i in inputs],
        "num_shards": count,
    }  # fmt: skip


def _claim(out: pathlib.Path, identity: dict[str, Any]) -> None:
    """Makes the directory; refuses one that holds other shards, or anything else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot write there: {error.strerror}; name another directory") from error
    there = [path for path in out.iterdir() if not path.name.endswith(".part")]
    if there:
        try:
            found = json.loads((out / IDENTITY).read_text())
        except (OSError, ValueError):
            raise UserError(f"--out={out}: is not empty, and holds no shards; name a new directory") from None
        for key, value in identity.items():
            if found.get(key) != value:
                raise UserError(
                    f"--out={out}: holds shards of another `{key}` ({IDENTITY}); remove it, or name another"
                )
    for path in out.glob(".*.part"):
        path.unlink()  # of a run that was killed
    write_whole(out / IDENTITY, _json(identity))


def _finish(out: pathlib.Path, identity: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {name: sum(entry[name] for entry in shards) for name in ("records", "tokens", "view_tokens", "bytes")}
    if not totals["records"]:
        raise UserError("--source: has no records; each line holds one JSON object")
    totals["num_pairs"] = sum(entry["pairs"] for entry in shards)
    write_whole(out / MANIFEST, _json(identity | totals | {"shards": shards}))
    return {"made": MADE, "shards": len(shards)} | totals


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer(config: Config, inputs: Sequence[Input], parts: Sequence[Sequence[Span]]) -> Tokenizer:
    """That of `init.checkpoint`, the one named, or one trained on the records."""
    if config.init.checkpoint:
        from llm_jepa_jax.checkpoint.initial import initial_tokenizer, open_initial  # seconds, for JAX

        start = open_initial(config)
        assert start is not None  # one is named
        return initial_tokenizer(config, start)
    if config.text.tokenizer:
        return load_tokenizer(config.text.tokenizer, config.text.chat_template)

    def texts() -> Iterator[str]:
        for span in (span for spans in parts for span in spans):
            for _, where, text in span.lines():
                for record in parse_records(text, where):
                    yield from record.contents()

    content_hash = inputs_hash([{"sha256": file.sha256} for file in inputs])
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser()
    return cached_tokenizer(texts, content_hash, config.text.vocab_size, cache_dir)


def _written(jobs: Sequence[Job], tokenizer: Tokenizer, pairs: str, processes: int) -> Iterator[dict[str, Any]]:
    """Entries of shards, as they are finished."""
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    if processes <= 1:
        yield from map(Worker(tokenizer, pairs, threading.Event()).write, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a copy of this process might hold locks of its threads
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start, (tokenizer, pairs, stop)) as pool:
        futures = [pool.submit(_write, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise TryAgainError(
                "--mode=prepare: a process was killed, perhaps for want of memory; finished shards are kept: start "
                "again, perhaps with fewer --processes or more --shards"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start(tokenizer: Tokenizer, pairs: str, stop: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    _worker = Worker(tokenizer, pairs, stop)


def _write(job: Job) -> dict[str, Any]:
    return _worker.write(job)
