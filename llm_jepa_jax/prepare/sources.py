# SPDX-License-Identifier: Apache-2.0
"""What `--source` names: fetched where it is an address, listed, and checked against checksums."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DataSet, Original
from llm_jepa_jax.prepare.download import fetch
from llm_jepa_jax.prepare.source_files import SourceFile, list_files, sha256_of

LOG = logging.getLogger("llm_jepa_jax")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files of all that was named."""

    named: str
    """As the command line says it."""
    files: tuple[SourceFile, ...]
    urls: dict[pathlib.Path, str]
    """Where fetched files come from."""

    def by_name(self, wanted: Iterable[str]) -> dict[str, SourceFile]:
        """Those of the files that are there.

        Raises:
            UserError: a name stands for several.
        """
        found: dict[str, SourceFile] = {}
        for name in wanted:
            same = [file for file in self.files if file.basename == name]
            if len(same) > 1:
                places = ", ".join(file.origin for file in same[:3])
                raise UserError(
                    f"--source={self.named}: {len(same)} files are named {name} ({places}); name one's directory"
                )
            if same:
                found[name] = same[0]
        return found


def open_sources(spec: str, originals: Sequence[Original], cache_dir: pathlib.Path) -> Sources:
    """Lists what `--source` names, with commas between; nothing named: what the data set says it was published as.

    Raises:
        UserError: it is not there, or there is nothing known to fetch.
    """
    parts = [part.strip() for part in spec.split(",")] if spec else [o.url for o in originals if o.default]
    if not parts:
        raise UserError("--mode=prepare: pass --source=PATH (a file, directory or archive) or --source=https://…")
    files: list[SourceFile] = []
    urls = {}
    for part in parts:
        path = fetch(part, cache_dir) if "://" in part else pathlib.Path(part).expanduser()
        if "://" in part:
            urls[path] = part
        files += list_files(path)
    return Sources(spec or ",".join(parts), tuple(files), urls)


def check_sums(
    sources: Sources, used: Iterable[SourceFile], originals: Sequence[Original], expected: str
) -> list[dict[str, str | int]]:
    """The facts of every file on disk that is used: name, address, bytes, sha256, and whether it is the original.

    Raises:
        UserError: a checksum is not `expected` (of one file), or not the recorded one of what was fetched.
    """
    if expected and not SHA256.fullmatch(expected):
        raise UserError(f"--sha256={expected}: is no sha256, which has 64 hexadecimal digits")
    paths = sorted({file.container for file in used})
    if expected and len(paths) != 1:
        raise UserError(f"--sha256: is of one file, but --source={sources.named} has {len(paths)} that are read")
    facts: list[dict[str, str | int]] = []
    for path in paths:
        found, url = sha256_of(path), sources.urls.get(path, "")
        wanted = expected.lower() or next((o.sha256 for o in originals if o.url == url), "")
        if wanted and found != wanted:
            where = f" fetched from {url}; remove it" if url else "; fetch it again"
            raise UserError(f"{path}: has the sha256 {found}, not {wanted}{where}, or pass --sha256={found} to take it")
        known = next((o for o in originals if o.sha256 == found), None)
        _say(path, found, known, originals)
        facts.append({"file": url or str(path), "bytes": path.stat().st_size, "sha256": found})
        facts[-1]["original"] = known.url if known else ""
    return facts


def _say(path: pathlib.Path, found: str, known: Original | None, originals: Sequence[Original]) -> None:
    LOG.info("%s: sha256 %s%s", path, found, f", as recorded of {known.url}" if known else "")
    namesake = next((o for o in originals if o.url.endswith("/" + path.name)), None)
    if namesake and not known:
        LOG.warning("%s: is not what %s was recorded to be (sha256 %s)", path, namesake.url, namesake.sha256)


def dataset_files(dataset: DataSet, sources: Sources) -> dict[str, SourceFile]:
    """Those of the files that the data set knows, or that lie beside them, by name."""
    layouts = {name for layout in dataset.layouts for names in layout.splits.values() for name in names}
    return sources.by_name(layouts | set(dataset.extra))
