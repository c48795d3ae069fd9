# SPDX-License-Identifier: Apache-2.0
"""What an export has beside its weights: tokenizers that know new tokens, generation settings, licence, model card."""

import dataclasses
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers

import llm_jepa_jax as lj
from llm_jepa_jax.analysis.model_card import CardFacts, card_files
from llm_jepa_jax.config import Config, InitConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.text.chat import Message, render, render_prompt
from llm_jepa_jax.text.pretrained import load_pretrained
from llm_jepa_jax.text.tokenizer import load_tokenizer
from tests.chat_families import TEXTS, write_family
from tests.conftest import CACHE
from tests.test_hf_files import MODEL, write
from tests.test_initial import QUICK
from tests.test_pretrained import TURNS

SETTINGS = {
    "data": {"synthetic_train": 60, "synthetic_eval": 8, "row_length": 1024, "rows_per_step": 8, "row_buckets": 1},
    "mesh": {"fsdp": 4, "tensor": 2},
    "train": {"num_steps": 2, "num_epochs": 0, "compile_cache": str(CACHE)},
    "log": {"report": False, "tensorboard": False, "every_steps": 1},
    "eval": {"final_examples": 2, "max_new_tokens": 2, "batch_size": 8},
}  # fmt: skip
WORDS = ["a", " ", "lines ", "12", "\n", "é", "🙂", "  ", "moon", ".*[0-9]", "\t", "日", "<|user|", "|>"]
CARD = "---\nlanguage: en\nlicense: other\nlicense_name: miniature\nlicense_link: LICENSE\n---\n# Base\nlicense: no\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published directory whose vocabulary reserves nothing, with a licence."""
    directory = write_family("qwen3", tmp_path_factory.mktemp("base"))
    kept = {name: (directory / name).read_bytes() for name in ("config.json", "generation_config.json")}
    tokenizer = load_tokenizer(directory)
    size = tokenizer.vocab_size - len(tokenizer.new_ids)
    size += size % 2
    family = {"qk_norm": "head", "family": "qwen3", "vocab_size": size, "max_positions": 2048}
    write(directory.parent / "weights", dataclasses.replace(MODEL, **family), shard_bytes=10**9)
    for path in (directory.parent / "weights").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | json.loads(kept["config.json"])))
    (directory / "generation_config.json").write_bytes(kept["generation_config.json"])
    (directory / "README.md").write_text(CARD)
    (directory / "LICENSE").write_text("The miniature licence.\n")
    return directory


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run that started from it, sharded over eight devices, with k = 2, and its export."""
    place = tmp_path_factory.mktemp("trained")
    (place / "settings.json").write_text(json.dumps(SETTINGS))
    size = load_tokenizer(base).vocab_size
    argv = ["main", f"--config={place}/settings.json", f"--config.init.checkpoint={base}", f"--workdir={place}/run"]
    run([*argv, f"--config.model.vocab_size={size + size % 2}", "--config.objective.jepa.num_predictors=2"])
    result = run(["main", "--mode=export", f"--workdir={place}/run", f"--out={place}/out", "--shard_bytes=40000"])
    assert result["weight_files"] == len(list((place / "out").glob("*.safetensors"))) > 1
    return place / "run", place / "out"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run from random weights with a tokenizer of its own, and its export."""
    place = tmp_path_factory.mktemp("ours")
    run([*QUICK, f"--workdir={place}/run"])
    lj.load(place / "run").save_hf(place / "out")
    return place / "run", place / "out"


def texts():
    rng = random.Random(0)
    return ["".join(rng.choices(WORDS, k=rng.randint(1, 15))) for _ in range(200)]


def test_the_exported_tokenizer_knows_new_tokens(base, trained):
    """Under our ids; what needs no change is byte for byte; we read it back as we wrote it."""
    workdir, out = trained
    before, after = lj.load(workdir).tokenizer, lj.load(out).tokenizer
    read = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for number, index in enumerate(before.predictor_ids, start=1):
        assert read.token_to_id(f"<|predictor_{number}|>") == index and after.piece(index) == before.piece(index)
    assert read.token_to_id("<|predictor_mask|>") == before.mask_id == after.mask_id
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert after.predictor_ids == before.predictor_ids and after.vocab_size == before.vocab_size
    assert after.forbidden_ids == before.forbidden_ids == set(before.new_ids) and not after.new_ids
    assert [after.encode(text) for text in texts()] == [before.encode(text) for text in texts()]
    assert not set(after.encode("<|predictor_1|>")) & {*after.predictor_ids}
    assert render(after, TURNS).tokens.tolist() == render(before, TURNS).tokens.tolist()
    config = json.loads((out / "config.json").read_text())
    assert config["bos_token_id"] == json.loads((base / "config.json").read_text())["bos_token_id"]


def test_an_export_is_exported_as_it_is(trained, tmp_path):
    """A second time nothing is added; the same holds for a checkpoint that was never trained here."""
    _, out = trained
    lj.load(out).save_hf(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "predictor_tokens.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    card = (tmp_path / "again" / "README.md").read_text()
    assert "`out` as it is" in card and "## Training" not in card and "license: other" in card
    assert not (tmp_path / "again" / "training_config.json").exists()


def test_rows_of_predictors_can_be_dropped(base, trained, tmp_path):
    workdir, _ = trained
    run(["main", "--mode=export", f"--workdir={workdir}", f"--out={tmp_path}/out", "--predictor_rows=drop"])
    out = tmp_path / "out"
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    result = run(["main", "--mode=verify", f"--workdir={workdir}", f"--against={out}"])
    assert result["equal"] and result["vocabulary_rows"]["compared"] == rows
    card = (out / "README.md").read_text()
    assert "predictor tokens (left out here)" in card and "leaves them out" in card.split("## Tokenizer")[1]


def test_where_there_is_nothing_to_drop_it_is_said(ours, tmp_path, caplog):
    caplog.set_level("INFO")
    lj.load(ours[0]).save_hf(tmp_path / "out", predictor_rows="drop")
    assert "none is dropped" in caplog.text
    assert (tmp_path / "out" / "config.json").read_bytes() == (ours[1] / "config.json").read_bytes()


def test_a_tokenizer_of_ours_is_one_of_theirs(ours):
    """`tokenizers` encodes with the exported `tokenizer.json` as SentencePiece does with the model beside it."""
    workdir, out = ours
    tokenizer, read = lj.load(workdir).tokenizer, tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert (out / "tokenizer.model").read_bytes() == (workdir / "tokenizer.model").read_bytes()
    for text in texts():
        assert read.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    for number, index in enumerate(tokenizer.predictor_ids, start=1):
        assert read.token_to_id(f"<|predictor_{number}|>") == index
    assert lj.load(out).tokenizer.fingerprint == tokenizer.fingerprint
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    assert generation.items() <= json.loads((out / "config.json").read_text()).items()


@pytest.mark.parity
def test_auto_tokenizer_gives_our_ids(trained, ours):
    transformers = pytest.importorskip("transformers")
    for workdir, out in (trained, ours):
        tokenizer, theirs = lj.load(workdir).tokenizer, transformers.AutoTokenizer.from_pretrained(out)
        for number, index in enumerate(tokenizer.predictor_ids, start=1):
            assert theirs.convert_tokens_to_ids(f"<|predictor_{number}|>") == index
            assert theirs.encode(f"<|predictor_{number}|>", add_special_tokens=False) == [index]
        for text in texts():
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        turns = TURNS[1:3]
        spelled = [{"role": turn.role, "content": turn.content} for turn in turns]
        ids = theirs.apply_chat_template(spelled)["input_ids"]
        assert ids == render(tokenizer, turns).tokens.tolist()
        asked = theirs.apply_chat_template(spelled[:1], add_generation_prompt=True, enable_thinking=False)["input_ids"]
        assert asked == render_prompt(tokenizer, [Message("user", turns[0].content)])
        assert theirs.eos_token_id == tokenizer.stop_ids[0] and theirs.pad_token_id == tokenizer.pad_id


@pytest.fixture
def sentencepiece_only(tmp_path):
    """A checkpoint's tokenizer that is a `tokenizer.model` and has no `tokenizer.json`."""
    directory = tmp_path / "source"
    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_prefix=str(directory / "tokenizer"), model_type="bpe", vocab_size=380,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def exported_tokenizer(source, target):
    target.mkdir()
    tokenizer = load_pretrained(source)
    for name, data in tokenizer.published_files(True).items():
        (target / name).write_bytes(data)
    return tokenizer


def test_new_tokens_of_a_sentencepiece_checkpoint(sentencepiece_only, tmp_path):
    """They are in `added_tokens_decoder`; a spelling that is taken is refused."""
    before = exported_tokenizer(sentencepiece_only, tmp_path / "out")
    after = load_pretrained(tmp_path / "out")
    assert after.predictor_ids == before.predictor_ids and after.forbidden_ids == before.forbidden_ids
    assert before.new_ids and not after.new_ids and after.vocab_size == before.vocab_size
    assert after.encode("lines with a <|predictor_1|>") == before.encode("lines with a <|predictor_1|>")
    (sentencepiece_only / "added_tokens.json").write_text('{"<|predictor_1|>": 380}')
    with pytest.raises(UserError, match=r"has a token <\|predictor_1\|> already; export without the rows"):
        exported_tokenizer(sentencepiece_only, tmp_path / "taken")


@pytest.mark.parity
def test_auto_tokenizer_of_a_sentencepiece_checkpoint(sentencepiece_only, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = exported_tokenizer(sentencepiece_only, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs.convert_tokens_to_ids(tokenizer.piece(index)) for index in tokenizer.new_ids] == [*tokenizer.new_ids]
    assert theirs.encode("lines with a digit", add_special_tokens=False) == tokenizer.encode("lines with a digit")


def test_the_card_says_what_is_known(base, trained, ours):
    """Objective, data, scores with counts, the base's licence; nothing of this machine."""
    for workdir, out in (trained, ours):
        card = (out / "README.md").read_text()
        front = card.split("---\n")[1].splitlines()
        assert front[:2] == ["library_name: transformers", "pipeline_tag: text-generation"] and "- llm-jepa" in front
        assert "| exact_match | " in card and "% of 2 examples (95%: " in card and "ntp_loss (training)" in card
        assert str(workdir.parent) not in card and str(base.parent) not in card and str(CACHE) not in card
        config = json.loads((out / "training_config.json").read_text())
        assert config["train"]["num_steps"] == 2 and "compile_cache" not in config["train"]
        assert str(base.parent) not in json.dumps(config)
        run_config = json.loads((workdir / "config.json").read_text())
        assert config["objective"] == run_config["objective"] and config["opt"] == run_config["opt"]
    front, card = (trained[1] / "README.md").read_text().split("---\n")[1:]
    for line in ("license: other", "license_name: miniature", "license_link: LICENSE"):
        assert line in front.splitlines()
    assert "language" not in front and "base_model" not in front, "the base is no model of the hub"
    ids = ", ".join(map(str, lj.load(trained[0]).tokenizer.predictor_ids[:2]))
    assert "`qwen3`" in card and f"k = 2 predictor tokens (ids {ids}) behind its content" in card
    assert "60 records" in card and "8 records" in card and "--config.init.checkpoint=qwen3" in card
    assert (
        "license" not in (ours[1] / "README.md").read_text() and "random weights" in (ours[1] / "README.md").read_text()
    )


def test_the_configuration_of_an_export_trains_again(ours, tmp_path):
    again = run(["main", f"--config={ours[1]}/training_config.json", f"--workdir={tmp_path}/run"])
    first, second = (lj.load(place).run.params for place in (ours[0], tmp_path / "run"))
    assert again["step"] == 2
    np.testing.assert_array_equal(first["embedding"], second["embedding"])


def test_wrong_settings_are_one_line(ours, tmp_path):
    lm = lj.load(ours[0])
    for settings, words in (
        ({"predictor_rows": "some"}, "predictor_rows='some'; use keep or drop"),
        ({"dtype": "int8"}, "dtype='int8'; use float32, bfloat16, float16"),
        ({"shard_bytes": 0}, "shard_bytes=0; use the most bytes of a file"),
    ):
        with pytest.raises(UserError, match=words):
            lm.save_hf(tmp_path / "out", **settings)
    with pytest.raises(UserError, match="--dtype belongs to --mode=export, not to eval"):
        run(["main", "--mode=eval", f"--workdir={ours[0]}", "--dtype=float16"])
    with pytest.raises(UserError, match="predictor_rows"):
        run(["main", "--mode=export", f"--workdir={ours[0]}", "--predictor_rows=none"])


def test_a_base_of_the_hub_is_named_and_nothing_is_made_up(tmp_path):
    """A run of which no other file is left: no scores, no counts, no licence."""
    config = Config(init=InitConfig(checkpoint="org/model"), model=MODEL)
    card = card_files(CardFacts(config, 3, tmp_path, None, None, "bfloat16", False))["README.md"].decode()
    assert 'base_model: "org/model"' in card.split("---\n")[1] and "# model trained with" in card
    assert "| steps | 3 |" in card and "--config.init.checkpoint=org/model" in card
    for absent in ("## Scores", "records", "license", "## Tokenizer", "## Embeddings", "--config.model."):
        assert absent not in card, absent
