# SPDX-License-Identifier: Apache-2.0
import json
import re

import numpy as np

from llm_jepa_jax.analysis.report import write_report
from llm_jepa_jax.config import Config, to_dict
from llm_jepa_jax.eval.scores import Score


def write_task(path, name, lines, words, skipped=None, value=0.625, share=True):
    """`eval/NAME.jsonl` and the score beside it."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (path / "eval" / f"{name}.jsonl").write_text(text, "utf-8")
    asked = sum(words.values()) or len(lines)
    score = Score(name.rpartition("-")[0], value, 0.31, 0.86, asked, words, skipped or {}, share)
    (path / "eval" / f"{name}.json").write_text(json.dumps(score.summary()))


def run_directory(path, jepa=True, evaluation=True):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(Config())))
    lines = []
    for step in range(10, 60, 10):
        line = {"step": step, "ntp_loss": 5 / step, "total_loss": 5 / step, "tokens_per_s": 4321.0}
        if jepa:
            line |= {"jepa_loss": 3 / step, "cos_pair": 0.9, "cos_shuffled": 0.1, "rank_text": 9.0, "rank_code": 8.0}
        lines.append(line)
    if evaluation:
        lines.append({"step": 50, "exact_match": 0.625, "perplexity": 7.389, "eval_examples": 8})
        (path / "eval").mkdir()
        right = {"prompt": "a & <b>", "answer": "x", "target": "x", "verdict": "right", "reason": "", "ended": True}
        wrong = {"prompt": "q", "answer": "<script>\u2028", "target": "y", "verdict": "wrong", "reason": "<no>"}
        skipped = {"record": "a:7", "verdict": "skipped", "reason": "no target"}
        write_task(path, "exact_match-9", [wrong], {"wrong": 1})
        lines_50 = [right] * 5 + [wrong | {"ended": False}] * 3 + [skipped]
        write_task(path, "exact_match-50", lines_50, {"right": 5, "wrong": 3}, {"no target": 1})
        write_task(path, "perplexity-50", [{"loss": 2.0, "tokens": 1}], {}, value=7.389, share=False)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if jepa:
        rng = np.random.default_rng(0)
        arrays = {f"{view}{when}_PxD": rng.normal(size=(40, 16)) for view in ("text", "code") for when in ("", "_init")}
        np.savez(path / "analysis.npz", **arrays)
    (path / "phases.json").write_text(json.dumps({"train": 61.2, "evaluate": 3.4}))
    return path


def test_report_is_one_file_with_the_inputs_numbers(tmp_path):
    directory = run_directory(tmp_path / "run")
    write_report(directory)
    page = (directory / "report.html").read_text()
    for number in (
        "62.5%",
        "0.100",
        "4,321",
        "5 of 8 right",
        "exact_match-50.jsonl",
        "31.0% and 86.0%",
        "1 skipped (no target)",
        "7.39 over 1 records",
    ):
        assert number in page, number
    plots = {path.stem for path in (directory / "plots").glob("*.png")}
    assert plots == {
        "losses", "cosine", "exact_match", "perplexity", "rank", "throughput", "singular_values",
        "cosine_histogram", "tsne", "phases",
    }  # fmt: skip
    assert page.count("data:image/png;base64,") == len(plots)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a &amp; &lt;b&gt;" in page and "<script>" not in page and "&lt;no&gt;" in page


def test_report_says_what_is_missing(tmp_path):
    directory = run_directory(tmp_path / "run", jepa=False, evaluation=False)
    write_report(directory)
    page = (directory / "report.html").read_text()
    assert "This run has no evaluation." in page
    assert {path.stem for path in (directory / "plots").glob("*.png")} == {"losses", "throughput", "phases"}
