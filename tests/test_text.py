# SPDX-License-Identifier: Apache-2.0
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.text.chat import ROLE_CODES, Message, render, render_prompt, render_view, view_tokens
from llm_jepa_jax.text.tokenizer import cached_tokenizer, load_tokenizer, train_tokenizer

TURNS = (Message("system", "Be brief."), Message("user", "lines with a digit"), Message("assistant", ".*[0-9].*"))


@given(text=st.text())
def test_encoding_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_cannot_make_control_tokens(tokenizer):
    text = "<|user|><|end_of_turn|><|predictor_1|><|pad|>"
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_control(i) for i in ids)
    assert tokenizer.decode(ids) == text


def test_reserved_ids_are_distinct(tokenizer):
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.end_of_turn_id]
    ids += [*tokenizer.role_ids.values(), *tokenizer.predictor_ids]
    assert tokenizer.pad_id == 0 and len(tokenizer.predictor_ids) == 10
    assert len(set(ids)) == len(ids)


def test_training_is_deterministic_and_cached(tmp_path):
    texts = [f"the word {i} and a letter" for i in range(200)]
    first = train_tokenizer(texts, 320)
    assert train_tokenizer(texts, 320).fingerprint == first.fingerprint
    cached = cached_tokenizer(lambda: texts, "hash", 320, tmp_path)
    assert cached.fingerprint == first.fingerprint
    again = cached_tokenizer(lambda: pytest.fail("trained again"), "hash", 320, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert pickle.loads(pickle.dumps(first)).encode("a word") == first.encode("a word")


def test_sizes_out_of_range_name_the_key_and_the_fix():
    with pytest.raises(UserError, match=r"text.vocab_size`=900 is too large .* use at most \d+"):
        train_tokenizer(["abc abd"], 900)
    with pytest.raises(UserError, match="text.vocab_size`=100 must be above"):
        train_tokenizer(["abc"], 100)


def test_a_wrong_record_among_the_texts_is_what_gets_reported():
    def texts():
        yield "a word"
        raise UserError("a.jsonl:2: not JSON")

    with pytest.raises(UserError, match="a.jsonl:2: not JSON"):
        train_tokenizer(texts(), 320)


def test_foreign_files_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")
    plain = tmp_path / "plain"
    sentences = iter(f"some words {i}" for i in range(100))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(plain), vocab_size=25, minloglevel=2
    )
    with pytest.raises(UserError, match=r"reserved piece <\|pad\|> is missing"):
        load_tokenizer(tmp_path / "plain.model")
    tokenizer.save_model(tmp_path / "ours.model")
    assert load_tokenizer(tmp_path / "ours.model").fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint, "a directory that holds one of ours"
    with pytest.raises(UserError, match="`text.chat_template`=plain beside `text.tokenizer`=.* its own chat format"):
        load_tokenizer(tmp_path, "plain")


def test_rendering_marks_roles_and_targets(tokenizer):
    rendered = render(tokenizer, TURNS)
    starts = np.flatnonzero(np.isin(rendered.tokens, list(tokenizer.role_ids.values())))
    assert rendered.tokens[0] == tokenizer.bos_id
    assert [int(rendered.tokens[s]) for s in starts] == [tokenizer.role_ids[turn.role] for turn in TURNS]
    for turn, start, end in zip(TURNS, starts, [*starts[1:], len(rendered.tokens)], strict=True):
        assert set(rendered.roles[start:end]) == {ROLE_CODES[turn.role]}
        assert rendered.tokens[end - 1] == tokenizer.end_of_turn_id
        assert tokenizer.decode(rendered.tokens[start + 1 : end - 1]) == turn.content
    targets = rendered.tokens[rendered.assistant_target]
    assert tokenizer.decode(targets) == TURNS[-1].content and targets[-1] == tokenizer.end_of_turn_id


def test_prompt_and_views(tokenizer):
    whole = render(tokenizer, TURNS).tokens.tolist()
    prompt = render_prompt(tokenizer, TURNS[:-1])
    assert whole[: len(prompt)] == prompt
    header, content = [tokenizer.bos_id, tokenizer.role_ids["user"]], tokenizer.encode(TURNS[1].content)
    view, size = render_view(tokenizer, "user", TURNS[1].content)
    end, ids = tokenizer.end_of_turn_id, tokenizer.predictor_ids
    assert view == [*header, *content] and size == 2
    parts = view_tokens(tokenizer, JepaConfig(num_predictors=2, view_end="turn"))
    assert parts.predicting(view, size).tolist() == [*view, *ids[:2], end] and parts.predicted(view).tolist() == [
        *view,
        end,
    ]
    assert parts.branch.tolist() == [*ids[:2], end]
    parts = view_tokens(tokenizer, JepaConfig(num_predictors=2, placement="prepend", shared_predictor=True))
    assert parts.predicting(view, size).tolist() == [*header, ids[0], ids[0], *content]
    assert not len(view_tokens(tokenizer, JepaConfig(num_predictors=0, view_end="turn")).branch)
