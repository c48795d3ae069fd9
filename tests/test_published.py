# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint, weights and tokenizer, through the whole program: load, answer, train, export, load again."""

import json

import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.text.chat import Message, render_prompt
from llm_jepa_jax.text.tokenizer import load_tokenizer
from tests.chat_families import write_family
from tests.conftest import CACHE
from tests.hf_models import make_model

pytestmark = pytest.mark.parity
PROMPTS = [f"lines with a digit and {words}" for words in ("a moon", "", "two  spaces", "naïve café", "x" * 60)]
SETTINGS = {
    "data": {"synthetic_train": 60, "synthetic_eval": 4, "row_length": 1024, "rows_per_step": 8},
    "train": {"num_steps": 2, "num_epochs": 0, "compile_cache": str(CACHE)},
    "log": {"report": False, "tensorboard": False, "every_steps": 1},
    "eval": {"final_examples": 2, "max_new_tokens": 2},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama3", "gemma2", "qwen3"])
def published(request, tmp_path_factory):
    """A directory as `transformers` writes it, with a tokenizer and a chat template of the family."""
    directory = write_family(request.param, tmp_path_factory.mktemp("published"))
    kept = {name: (directory / name).read_bytes() for name in ("config.json", "generation_config.json")}
    ids = json.loads(kept["config.json"])
    tokenizer = load_tokenizer(directory)
    size = tokenizer.vocab_size - len(tokenizer.new_ids)
    make_model(request.param, vocab_size=size, max_position_embeddings=2048).save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | ids))
    (directory / "generation_config.json").write_bytes(kept["generation_config.json"])
    return directory


def theirs(directory):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def test_answers_are_those_of_transformers(published):
    """Token for token."""
    import torch

    model, reference = lj.load(published), theirs(published)
    for prompt in PROMPTS:
        tokens = render_prompt(model.tokenizer, [Message("user", prompt)])
        out = reference.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, len(tokens) :].tolist()
        ended = [i for i, token in enumerate(out) if token in model.tokenizer.stop_ids]
        expected = model.tokenizer.decode(out[: ended[0]] if ended else out)
        assert model.generate([prompt], max_new_tokens=12) == [expected]


def test_trained_and_exported(published, tmp_path):
    """JEPA on its predictor tokens; what comes out loads in `transformers` and here. New tokens change one file."""
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    argv = ["main", f"--config={tmp_path}/settings.json", f"--config.init.checkpoint={published}"]
    result = run([*argv, f"--workdir={tmp_path}/run"])
    assert result["step"] == 2 and 0 < result["jepa_loss"] < 2
    exported = tmp_path / "exported"
    run(["main", "--mode=export", f"--workdir={tmp_path}/run", f"--out={exported}"])
    added = bool(load_tokenizer(published).new_ids)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        same = (exported / name).read_bytes() == (published / name).read_bytes()
        assert same != (added and name == "tokenizer.json"), name
    trained, again, reference = lj.load(tmp_path / "run"), lj.load(exported), theirs(exported)
    tokens = render_prompt(trained.tokenizer, [Message("user", "lines with a digit")])
    expected = logits(reference, tokens)
    for model in (trained, again):
        np.testing.assert_allclose(model.logits([tokens])[0], expected, atol=1e-4 * np.abs(expected).max())
    before = logits(theirs(published), tokens)  # the run has rows for predictor tokens, where the checkpoint had none
    assert np.abs(expected[:, : before.shape[1]] - before).max() > 0
    assert again.tokenizer.predictor_ids == trained.tokenizer.predictor_ids
    np.testing.assert_allclose(again.encode(["a digit"], 0), trained.encode(["a digit"], 0), atol=1e-4)


def test_mistakes_are_one_line(published, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    argv = ["main", f"--config={tmp_path}/settings.json", f"--workdir={tmp_path}/run"]
    with pytest.raises(UserError, match=r"`model.num_layers`=9 is not the \d of `init.checkpoint`=.*; set --config"):
        run([*argv, f"--config.init.checkpoint={published}", "--config.model.num_layers=9"])
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((published / name).read_bytes())
    with pytest.raises(UserError, match=r"has no tokenizer; name one with `text.tokenizer`"):
        run([*argv, f"--config.init.checkpoint={tmp_path}/bare"])
    with pytest.raises(UserError, match=r"came without a tokenizer; pass token ids"):
        lj.load(tmp_path / "bare").generate(["a"])
