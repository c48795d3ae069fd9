# SPDX-License-Identifier: Apache-2.0
"""`analysis.html`: several models' views and answers side by side, and how to read each picture."""

import dataclasses
import html
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from llm_jepa_jax.analysis import view_plots
from llm_jepa_jax.analysis.answers import BOTH_RIGHT, BOTH_WRONG, BROKEN, FIXED, Change, Comparison
from llm_jepa_jax.analysis.geometry import principal_plane, unit_rows
from llm_jepa_jax.analysis.measures import KS, Embeddings, Measured, Pairs
from llm_jepa_jax.analysis.page import figure, page
from llm_jepa_jax.analysis.plots import STYLE
from llm_jepa_jax.analysis.projections import tsne_places, umap_places
from llm_jepa_jax.analysis.view_plots import Label, named
from llm_jepa_jax.text.checkpoint_files import write_whole

PROJECTED = 500
"""Pairs in the plane, taken evenly: more would hide each other."""
CHANGES_SHOWN = 25
"""Of each kind on the page; the JSONL has all."""
WIDE = 9.0
"""Inches from which a picture takes the page's whole width."""
MORE_CSS = """
body{max-width:76rem} .plots{grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:2rem}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} .scroll{overflow-x:auto}
.note{border-left:4px solid #d9822b;padding:.3rem .8rem;background:#fdf6ec;margin:.4rem 0} details{margin:.6rem 0}
td.says{width:27%} h3{font-size:1rem;margin:1.4rem 0 .3rem}
"""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that is written."""

    pairs: Pairs
    models: Mapping[str, Mapping[str, Any]]
    """What is said of each model, by name."""
    embeddings: Mapping[Label, Embeddings]
    measured: Mapping[Label, Measured]
    comparisons: Sequence[Comparison]
    task: str
    notes: Sequence[str]
    """What the reader must know."""
    umap: bool

    def numbers(self) -> dict[str, Any]:
        """analysis.json."""
        chance = {
            way: {f"recall@{k}": v for k, v in found.items()} for way, found in self.pairs.chance().items()
        }  # fmt: skip
        models = {
            name: {**facts, "readings": {r: m.summary() for (owner, r), m in self.measured.items() if owner == name}}
            for name, facts in self.models.items()
        }
        return {
            "data": {**self.pairs.summary(), "chance": chance, "records": list(self.pairs.locations)},
            "models": models, "task": self.task, "changes": [found.summary() for found in self.comparisons],
            "notes": list(self.notes),
        }  # fmt: skip


def write_analysis(analysis: Analysis, out: pathlib.Path) -> None:
    """Writes analysis.json, embeddings.npz, plots/*.png, changes-A-B.jsonl and analysis.html."""
    write_whole(
        out / "analysis.json",
        (json.dumps(analysis.numbers(), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"),
    )
    arrays = {
        f"{model}/{reading}/{view}": array
        for (model, reading), found in analysis.embeddings.items()
        for view, array in found._asdict().items()
    }
    np.savez_compressed(out / "embeddings.npz", **arrays)
    for found in analysis.comparisons:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found.lines())
        write_whole(out / changes_name(found), text.encode("utf-8", "backslashreplace"))
    (out / "plots").mkdir(exist_ok=True)
    images = []
    with matplotlib.rc_context(STYLE):
        for name, caption in _captions(analysis).items():
            drawn = _draw(name, analysis)
            drawn.savefig(out / "plots" / f"{name}.png")
            wide = drawn.get_size_inches()[0] > WIDE
            images.append(figure(name, (out / "plots" / f"{name}.png").read_bytes(), caption, wide))
    names = " · ".join(analysis.models)
    body = [
        f'<h1>{html.escape(names)}</h1><p class="dim">{html.escape(_about(analysis.pairs))}</p>',
        *(f'<p class="note">{html.escape(text)}</p>' for text in analysis.notes),
        _models(analysis), _numbers(analysis), f'<h2>Pictures</h2><div class="plots">{"".join(images)}</div>',
        *(_changes(found, analysis.task) for found in analysis.comparisons),
        "<h2>Records</h2><details><summary>where the pairs are from</summary><pre>"
        f"{html.escape(chr(10).join(analysis.pairs.locations))}</pre></details>",
    ]  # fmt: skip
    write_whole(out / "analysis.html", page(f"Analysis: {names}", body, MORE_CSS))


def changes_name(found: Comparison) -> str:
    """The file of one comparison."""
    return f"changes-{found.first}-{found.second}.jsonl"


def _about(pairs: Pairs) -> str:
    facts = pairs.summary()
    return (
        f"{facts['pairs']:,} pairs of {facts['records']:,} records; {facts['different_texts']:,} different texts, "
        f"{facts['different_codes']:,} different codes"
    )


def _captions(analysis: Analysis) -> dict[str, str]:
    """How to read each picture, by name."""
    chance = analysis.pairs.chance()["text_to_code"]
    few = any(found.map.too_few for found in analysis.measured.values())
    captions = {
        "singular_values": "How far apart the two views of a record are, direction by direction, largest first (log "
        "scale). A low, steep curve: the views differ in few directions, so one is nearly a simple function of the "
        "other. Left as the papers draw it; right over the embeddings' length, so that short ones gain nothing.",
        "linear_map": "Half of the pairs fit a linear map from Enc(Text) to Enc(Code); the bars are what it leaves of "
        "the codes' variance. Read the held-out bar (orange): 0 is an exact map, 1 no better than always saying the "
        "mean. The grey ones are codes that do not belong to their texts: what chance gets. "
        + ("There are fewer fitted pairs than twice the width, so the fitted half (blue) says nothing." if few else
           "Blue far below orange: few pairs for this width."),
        "cosine_histograms": "Cosine of the two views of a record (blue), and of a text with another record's code "
        "(grey). The further apart, the more the views know of each other. Both at 1: all embeddings point one way, "
        "which is collapse.",
        "recall": "How often a text's own code is the nearest of all (@1), or among the ten nearest, and the other way "
        f"round. A random order gets {100 * chance[1]:.2g}% and {100 * chance[10]:.2g}%; ties count as a random order.",
        "alignment_uniformity": "Lower left is better: pairs close together, everything else spread over the sphere. "
        "Lower right: pairs are close because everything is (collapse).",
        "pca": "PCA: the plane in which all embeddings of a model vary most. Grey lines join the views of one record: "
        "short lines mean that they agree. Two clouds apart: the views differ by a constant direction.",
        "tsne": "t-SNE: neighbours stay neighbours; distances between far groups mean nothing. Blue and orange mixed: "
        "the two views of a record are nearer to each other than to other records.",
    }  # fmt: skip
    return captions | ({"umap": "UMAP: as t-SNE, by another method: what both show is there."} if analysis.umap else {})


def _draw(name: str, analysis: Analysis) -> Figure:
    """The picture of that name."""
    of_measures = {
        "singular_values": view_plots.spectra, "linear_map": view_plots.linear_maps,
        "cosine_histograms": view_plots.cosine_histograms, "recall": view_plots.recalls,
        "alignment_uniformity": view_plots.alignment_uniformity,
    }  # fmt: skip
    if name in of_measures:
        return of_measures[name](analysis.measured)
    return view_plots.planes(_planes(analysis, name))


def _planes(analysis: Analysis, method: str) -> dict[Label, Any]:
    chosen = np.linspace(0, len(analysis.pairs) - 1, min(PROJECTED, len(analysis.pairs))).round().astype(int)
    found = {}
    for label, embedded in analysis.embeddings.items():
        text_PxD, code_PxD = (unit_rows(view[chosen]) for view in embedded)
        if method == "pca":
            plane = principal_plane(text_PxD, code_PxD)
            words = f"{100 * plane.explained[0]:.0f}% and {100 * plane.explained[1]:.0f}% of the variance"
            found[label] = ((plane.text_Px2, plane.code_Px2), words)
        else:
            found[label] = ((tsne_places if method == "tsne" else umap_places)(text_PxD, code_PxD), "")
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Cells of the first column are names; all are text, not HTML."""
    number = ' class="number"' if numbers else ""
    head = "".join(f"<th{number if i else ''}>{html.escape(cell)}</th>" for i, cell in enumerate(heads))
    body = [
        "<tr>" + "".join(f"<td{number if i else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _models(analysis: Analysis) -> str:
    keys = ("what", "directory", "step", "width", "layers", "read", "trained")
    rows = [
        [name, *("–" if facts[key] is None else str(facts[key]) for key in keys)]
        for name, facts in analysis.models.items()
    ]
    both = (
        "Enc(·) is the hidden state at the place and layer that “read” names (the papers': a view's last token, last "
        "layer), and is there for every model. "
        "“With [PRED]” has the predictor tokens beside the view that predicts, as training compares the two; only "
        "models trained with them have it. No learned linear predictor is applied. All is computed in float32."
    )  # fmt: skip
    return f'<h2>Models</h2>{_table(["name", *keys], rows, numbers=False)}<p class="dim">{both}</p>'


def _numbers(analysis: Analysis) -> str:
    found = list(analysis.measured.values())
    plain: dict[str, Callable[[Measured], str]] = {
        "largest singular value of the difference": lambda m: f"{m.spectrum[0]:.3g}",
        "mean of the first 100, over √pairs · length": lambda m: f"{m.relative_spectrum[:100].mean():.3g}",
        "length of Enc(Text), Enc(Code)": lambda m: f"{m.length_text:.3g}, {m.length_code:.3g}",
        "effective rank: text, code": lambda m: f"{m.rank_text:.1f}, {m.rank_code:.1f}",
        "effective rank of the difference": lambda m: f"{m.rank_difference:.1f}",
        "cosine: pairs, shuffled": lambda m: f"{m.cosines.pairs_P.mean():.3f}, {m.cosines.shuffled_P.mean():.3f}",
        "gap between them, standard deviations": lambda m: f"{m.cosines.gap:.2f}",
        "alignment": lambda m: f"{m.alignment:.3f}",
        "uniformity: text, code": lambda m: f"{m.uniformity_text:.2f}, {m.uniformity_code:.2f}",
        "linear map, share left: fitted half, held out": lambda m: (
            f"{m.map.pairs.train:.3f}, {m.map.pairs.held_out:.3f}"
        ),
        "… permuted pairs": lambda m: f"{m.map.permuted.train:.3f}, {m.map.permuted.held_out:.3f}",
        "… Gaussian codes": lambda m: f"{m.map.gaussian.train:.3f}, {m.map.gaussian.held_out:.3f}",
        "pairs fitted, held out; width": lambda m: f"{m.map.num_train}, {m.map.num_held_out}; {m.map.width}",
    }
    for way, words in (("text_to_code", "text → code"), ("code_to_text", "code → text")):
        name = f"recall@{KS[0]}, @{KS[1]}: {words}, %"
        plain[name] = lambda m, way=way: ", ".join(f"{100 * getattr(m, way)[k]:.1f}" for k in KS)
    rows = [[name, *(of(m) for m in found)] for name, of in plain.items()]
    return f"<h2>Numbers</h2>{_table(['', *(named(label) for label in analysis.measured)], rows)}"


def _changes(found: Comparison, task: str) -> str:
    facts = found.summary()
    first, second = html.escape(found.first), html.escape(found.second)
    words = (
        f"{html.escape(task)} on {facts['asked']:,} records: {second} fixes <b>{facts['fixed']}</b> of {first}'s wrong "
        f"answers and breaks <b>{facts['broken']}</b> of its right ones; {found.count(BOTH_RIGHT)} both right, "
        f"{found.count(BOTH_WRONG)} both wrong; {100 * facts['share_right_first']:.1f}% → "
        f"{100 * facts['share_right_second']:.1f}%. McNemar's exact test, two-sided: p = {facts['mcnemar_p']:.3g}"
        f"{' (no evidence of a difference)' if facts['mcnemar_p'] > 0.05 else ''}."
        + (f" {found.skipped} records were not judged." if found.skipped else "")
        + f" All are in <code>{html.escape(changes_name(found))}</code>."
    )
    parts = [f"<h2>Fixed and broken: {first} → {second}</h2><p>{words}</p>"]
    for kind in (FIXED, BROKEN):
        changes = found.of(kind)
        shown = f", the first {CHANGES_SHOWN}" if len(changes) > CHANGES_SHOWN else ""
        rows = "".join(map(_change, changes[:CHANGES_SHOWN])) or '<tr><td colspan="4" class="dim">none</td></tr>'
        heads = f"<tr><th>question</th><th>gold</th><th>{first}</th><th>{second}</th></tr>"
        parts.append(f'<h3>{kind.capitalize()}: {len(changes)}{shown}</h3><div class="scroll"><table>{heads}{rows}')
        parts.append("</table></div>")
    return "".join(parts)


def _change(change: Change) -> str:
    cells = [html.escape(change.first["prompt"]), f"<code>{html.escape(change.first['target'])}</code>"]
    for line in (change.first, change.second):
        right = line["verdict"] == "right"
        mark = '<span class="right">✓</span>' if right else '<span class="wrong">✗</span>'
        why = f' <span class="dim">{html.escape(line["reason"])}</span>' if line["reason"] else ""
        cells.append(f"{mark} <code>{html.escape(line['answer'])}</code>{why}")
    return "<tr>" + "".join(f'<td class="says">{cell}</td>' for cell in cells) + "</tr>"
