# SPDX-License-Identifier: Apache-2.0
"""Published data sets to JSONL: `--mode=prepare --dataset=NAME`."""

import logging
import pathlib
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DataSet, Drop, Layout, drawn_split, known
from llm_jepa_jax.prepare.source_files import SourceFile
from llm_jepa_jax.prepare.sources import check_sums, dataset_files, open_sources
from llm_jepa_jax.prepare.written import writing

LOG = logging.getLogger("llm_jepa_jax")
ALL = "all"
"""The split of a layout whose rows are told apart."""


def prepare_dataset(
    name: str, source: str, sha256: str, out: pathlib.Path, seed: int, cache_dir: pathlib.Path
) -> dict[str, Any]:
    """Writes a published data set's splits as JSONL, and a manifest.

    Args:
        name: one of `dataset.known`.
        source: files, directories, archives or https addresses, with commas; empty: the recorded addresses.
        sha256: expected checksum of the one file read; empty: the recorded one, if any.
        out: directory to write.
        seed: of splits that are drawn.
        cache_dir: where fetched files are kept.

    Raises:
        UserError: unknown name, wrong source or row (`file:line`), or a checksum that differs.
    """
    datasets = known()
    if name not in datasets:
        raise UserError(f"--dataset={name}: is not known; use one of {', '.join(sorted(datasets))}, or --columns")
    dataset = datasets[name]
    sources = open_sources(source, dataset.originals, cache_dir)
    files = dataset_files(dataset, sources)
    layout, splits = _layout(dataset, files, sources.named)
    LOG.info("%s: licence %s; %s", name, dataset.licence, dataset.homepage)
    used = [files[file] for names in splits.values() for file in names]
    facts = check_sums(sources, used, dataset.originals, sha256)
    check = dataset.check(files) if dataset.check else None
    made = {
        "made": name, "licence": dataset.licence, "homepage": dataset.homepage, "sources": facts,
        "split_rule": layout.rule, "seed": seed,
    }  # fmt: skip
    with writing(out, made) as written:
        for split, names in splits.items():
            for where, row in layout.rows(*(files[file] for file in names)):
                if check:
                    check(row, where)
                try:
                    line = layout.record(row, where)
                except Drop as drop:
                    written.drop(str(drop), where)
                    continue
                written.add(_split(layout, split, row, line, seed), line, where)
    return made | {"out": str(out)}


def _layout(dataset: DataSet, files: dict[str, SourceFile], named: str) -> tuple[Layout, dict[str, tuple[str, ...]]]:
    """The arrangement that the files have, and those of its splits that are there."""
    for layout in dataset.layouts:
        there = {split: names for split, names in layout.splits.items() if set(names) <= set(files)}
        if not there:
            continue
        for split in [split for split in layout.splits if split not in there]:
            missing = " and ".join(name for name in layout.splits[split] if name not in files)
            LOG.info("%s: no %s split, as %s is not there", dataset.name, split, missing)
        return layout, there
    wanted = "; or ".join(
        ", ".join(" with ".join(names) for names in layout.splits.values()) for layout in dataset.layouts
    )
    raise UserError(f"--source={named}: has none of the files of {dataset.name}: {wanted}")


def _split(layout: Layout, split: str, row: Any, line: dict[str, Any], seed: int) -> str:
    if split != ALL:
        return split
    return layout.split_of(row) if layout.split_of else drawn_split(line, seed)
