# SPDX-License-Identifier: Apache-2.0
"""Packed rows in colour: what is a target, which view a token belongs to, and where pairs end."""

import numpy as np
from rich.console import Console
from rich.text import Text

from llm_jepa_jax.data.pipeline import TrainData
from llm_jepa_jax.text.tokenizer import Tokenizer

Row = dict[str, np.ndarray]
Ends = dict[int, list[int]]
"""Pairs by the place where they are read."""
STYLES = {
    "conversation": "default",
    "plain text": "default",
    "text view": "cyan",
    "code view": "green",
    "stp text": "blue",
    "predictor": "bold white on magenta",
    "padding": "bright_black",
}
TARGET = "bold yellow"
PAIR_END = "reverse"


def show_rows(data: TrainData, tokenizer: Tokenizer, num_rows: int, console: Console) -> None:
    """Prints the legend, `num_rows` rows of each kind in the first epoch, and the packing fill."""
    legend = Text("legend: ")
    for name, style in STYLES.items():
        legend.append(name, style).append("  ")
    legend.append("target", TARGET).append("  ").append("pair end", PAIR_END)
    console.print(legend)
    s = data.summary()
    for kind, plan, k in zip(data.kinds, data.epochs.get(0).plans, s["kinds"], strict=True):
        console.print(
            f"steps of {kind}: {k['examples']} examples in {k['rows_per_epoch']} rows an epoch, fill {k['fill']:.1%}"
        )
        shown = plan.rows(0, num_rows)
        rows = data.builder(shown, len(shown), kind.row)
        plain = data.builder.is_text(shown.examples)
        for number in range(len(shown)):
            row = {name: array[number] for name, array in rows.items()}
            texts = plain[shown.offsets[number] : shown.offsets[number + 1]].tolist()
            _show_row(row, number, texts, data.config.objective.jepa.source, tokenizer, console)
    console.print(
        f"packing: {s['examples']} examples in {s['rows_per_epoch']} rows an epoch, fill {s['fill']:.1%}, "
        f"{s['examples_per_row']:.1f} examples a row, {s['pairs']} pairs, {s['dropped']} records dropped"
    )


def _show_row(row: Row, number: int, plain: list[bool], source: str, tokenizer: Tokenizer, console: Console) -> None:
    """`plain` says which of the row's examples are plain text."""
    length, segments = len(row["segments"]), row["segments"]
    used = int((segments > 0).sum())
    console.rule(f"row {number}: {int(row['num_examples'])} examples, {used} of {length} tokens")
    texts, codes, targets = _marks(row, source)
    examples = iter(plain)
    for segment in range(1, int(segments.max(initial=0)) + 1):
        places = np.flatnonzero(segments == segment).tolist()
        ends = {place: texts.get(place, []) + codes.get(place, []) for place in places if place in texts | codes}
        if targets.intersection(places):
            view = "plain text" if next(examples) else "conversation"
        else:  # views and the texts of `objective.stp.mode`=mask have no targets
            view = "text view" if texts.keys() & ends else "code view" if ends else "stp text"
        line = _line(row, f"{segment:3d} {view:<12}", places)
        for place in places:
            line.append_text(_token(int(row["tokens"][place]), view, place in targets, place in ends, tokenizer))
        for pair in (pair for pairs in ends.values() for pair in pairs):
            line.append(f"  ← pair {pair}", "dim")
        console.print(line)
    if used < length:
        console.print(Text(f"    padding      {length - used} tokens", STYLES["padding"]))
    _show_branches(row, tokenizer, console)


def _show_branches(row: Row, tokenizer: Tokenizer, console: Console) -> None:
    """The predictor tokens behind the row, and where each branch hangs."""
    length, pairs = len(row["segments"]), np.flatnonzero(row["pair_weight"])
    size = (len(row["tokens"]) - length) // max(1, len(row["pair_weight"]))
    for pair in pairs.tolist() if size else []:
        places = list(range(length + pair * size, length + (pair + 1) * size))
        line = _line(row, f"    branch       of place {row['branch_end'][pair]}", places)
        for place in places:
            line.append_text(_token(int(row["tokens"][place]), "predictor", False, place == places[-1], tokenizer))
        console.print(line.append(f"  ← pair {pair}", "dim"))


def _line(row: Row, name: str, places: list[int]) -> Text:
    return Text(f"{name} pos {row['positions'][places[0]]}–{row['positions'][places[-1]]}  ", "dim")


def _marks(row: Row, source: str) -> tuple[Ends, Ends, set[int]]:
    """Pairs by the places where their text views and code views end, and places that are predicted."""
    sources: Ends = {}
    targets: Ends = {}
    for pair in np.flatnonzero(row["pair_weight"]).tolist():
        sources.setdefault(int(row["predictor_index"][pair]), []).append(pair)
        targets.setdefault(int(row["code_index"][pair]), []).append(pair)
    texts, codes = (sources, targets) if source == "text" else (targets, sources)
    predicted = row["target_index"][row["target_weight"] > 0] + 1
    return texts, codes, set(predicted.tolist())


def _token(index: int, view: str, is_target: bool, is_end: bool, tokenizer: Tokenizer) -> Text:
    style = STYLES["predictor"] if index in tokenizer.predictor_ids else TARGET if is_target else STYLES[view]
    return Text(tokenizer.piece(index), f"{style} {PAIR_END}" if is_end else style).append("·", "bright_black")
