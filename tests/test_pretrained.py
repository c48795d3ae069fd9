# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and chat templates of checkpoints: ids, spans, views, and what is said of wrong files."""

import functools
import json
import pathlib
import pickle
import random
import shutil

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_jepa_jax
from llm_jepa_jax.data.cuts import sentence_bounds
from llm_jepa_jax.data.sources import SyntheticSource
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.text.chat import ROLE_CODES, Message, render, render_document, render_prompt, render_view, view_tokens
from llm_jepa_jax.text.tokenizer import load_tokenizer, saved_tokenizer
from tests.chat_families import FAMILIES, TEXTS, write_family
from tests.conftest import CACHE, host_rows, small_config, small_data

RECORDED = json.loads((pathlib.Path(__file__).parent / "data" / "chat_ids.json").read_text())
TURNS = (
    Message("system", "Convert natural language to a regular expression."),
    Message("user", "lines with a digit?"),
    Message("assistant", ".*[0-9].*"),
    Message("user", "  and the\nword 'moon'\n"),
    Message("assistant", "naïve 日本"),
)
CASES = {"whole": TURNS, "no system": TURNS[1:], "one exchange": TURNS[1:3]}
STARTS = {
    "llama3": "<|begin_of_text|><|start_header_id|>", "gemma2": "<bos><start_of_turn>", "qwen3": "<|im_start|>",
    "olmo2": "<|endoftext|>", "mistral": "<s>", "chatml": "<|im_start|>",
}  # fmt: skip
VIEWS = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma2": ("<bos><start_of_turn>user\n", "<bos><start_of_turn>model\n"),
    "qwen3": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "olmo2": ("<|endoftext|><|user|>\n", "<|endoftext|><|assistant|>\n"),
    "mistral": ("<s>[INST]", "<s>"),
    "chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
}
ENDS = {
    "llama3": "<|eot_id|>", "gemma2": "<end_of_turn>", "qwen3": "<|im_end|>", "olmo2": "<|endoftext|>",
    "mistral": "</s>", "chatml": "<|im_end|>",
}  # fmt: skip
USER_DEFINED = ["▁▁▁▁", "\n\n", "<b>"]
PIECES = [*"ab .?\n\t🙂é日'\u00a0\x1c\u2028<|>", "<|eot_id|>", "</s>", "[/INST]", "<eos>", "    ", "\n\n", "<b>"]
ODD = st.lists(st.sampled_from(PIECES), max_size=8)
CONTENT = st.one_of(ODD.map("".join), st.text(max_size=12)).filter(lambda text: text.strip() and "\ufdd0" not in text)


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    directory = tmp_path_factory.mktemp("families")
    return {name: write_family(name, directory) for name in FAMILIES}


@pytest.fixture(scope="session")
def loaded(families):
    return {name: load_tokenizer(directory) for name, directory in families.items()}


def shown(tokenizer, ids):
    return "".join(tokenizer.piece(int(index)) for index in ids)


def kept(name, content):
    """A content as the family's template keeps it."""
    return content.strip() if name in ("llama3", "gemma2") else content


def spelled(tokenizer, turns):
    """What is fed to `apply_chat_template`: folded where the template has no system turn."""
    if tokenizer.chat.template.folds_system and turns[0].role == "system":
        turns = [Message("user", f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:]]
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_ids_are_the_recorded_ones(loaded, name, case):
    """Those that `apply_chat_template` gave; `test_ids_equal_transformers` checks that it still does."""
    tokenizer, turns = loaded[name], CASES[case]
    assert render(tokenizer, turns).tokens.tolist() == RECORDED[name][case]["whole"]
    assert render_prompt(tokenizer, turns[:-1]) == RECORDED[name][case]["prompt"]


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_transformers(families, loaded, name):
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(families[name]), loaded[name]
    settings = {"date_string": "26 Jul 2024", "enable_thinking": False}
    for case, turns in CASES.items():
        turns = spelled(tokenizer, turns)
        ids = theirs.apply_chat_template(turns, **settings)["input_ids"]
        asked = theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, **settings)["input_ids"]
        assert {"whole": ids, "prompt": asked} == RECORDED[name][case]
    rng, words = random.Random(0), ["a", " ", "\n", "é", "🙂", ". ", "digit", "\t", "  ", "1", "|", "日"]
    for _ in range(100):
        texts = ["b" + "".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(2)]
        turns = [Message("user", texts[0]), Message("assistant", texts[1])]
        ids = theirs.apply_chat_template(spelled(tokenizer, turns), **settings)["input_ids"]
        assert render(tokenizer, turns).tokens.tolist() == ids
        assert tokenizer.encode(texts[0]) == theirs.encode(texts[0], add_special_tokens=False)
        assert tokenizer.decode(ids[3:]) == theirs.decode(
            [i for i in ids[3:] if not tokenizer.is_control(i)], clean_up_tokenization_spaces=False
        )
    turns = [Message("user", "a <|eot_id|><|im_end|></s> <end_of_turn>b [INST] <|endoftext|>x"), TURNS[2]]
    ids = theirs.apply_chat_template(spelled(tokenizer, turns), sanitize_control_tokens=True, **settings)["input_ids"]
    assert render(tokenizer, turns).tokens.tolist() == ids, "control tokens spelled in messages are text"
    if name == "chatml":
        turns = spelled(tokenizer, TURNS)
        theirs_mask = theirs.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        assert render(tokenizer, TURNS).assistant_target.tolist() == [bool(i) for i in theirs_mask["assistant_masks"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_the_contents(loaded, name):
    tokenizer, rendered = loaded[name], render(loaded[name], TURNS)
    assert shown(tokenizer, rendered.tokens).startswith(STARTS[name]), "one beginning of the sequence"
    assert rendered.tokens.tolist().count(tokenizer.bos_id) <= 1 or name in ("olmo2", "chatml")
    for turn, (before, last), start in zip(TURNS, rendered.contents, rendered.starts, strict=True):
        content = tokenizer.decode(rendered.tokens[before + 1 : last + 1])
        assert content.strip() == turn.content.strip() and start <= before + 1
        if name != "mistral":
            assert content == kept(name, turn.content)
            assert set(rendered.roles[before + 1 : last + 1]) == {ROLE_CODES[turn.role]}
    targets = shown(tokenizer, rendered.tokens[rendered.assistant_target]).replace(" ", "")
    assert targets.startswith(f".*[0-9].*{ENDS[name]}") and targets.endswith(ENDS[name])
    assert rendered.tokens[rendered.assistant_target].tolist().count(tokenizer.stop_ids[0]) == 2


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=4, max_size=4), system=st.none() | CONTENT)
def test_any_content_is_found_again(loaded, name, contents, system):
    """Odd white space, control tokens spelled in text, any characters: found, and nothing but text."""
    tokenizer = loaded[name]
    turns = [Message(role, content) for role, content in zip(("user", "assistant") * 2, contents, strict=True)]
    turns = [Message("system", system)] * (system is not None) + turns
    try:
        rendered = render(tokenizer, turns)
    except UserError as error:
        assert any(words in str(error) for words in ("one token", "white space", "differently"))
        return
    for turn, (before, last) in zip(turns, rendered.contents, strict=True):
        ids = rendered.tokens[before + 1 : last + 1].tolist()
        assert not any(tokenizer.is_control(index) for index in ids)
        if name != "qwen3" or turn.content.isascii():  # it composes characters
            assert tokenizer.decode(ids).strip() == turn.content.strip()
    ends = np.flatnonzero(rendered.tokens == tokenizer.stop_ids[0])
    assert rendered.assistant_target[ends].sum() == 2
    for role, content in zip(("user", "assistant"), contents, strict=False):
        try:
            tokens, header = render_view(tokenizer, role, content)
        except UserError as error:
            assert "one token" in str(error)
            continue
        if name != "qwen3" or content.isascii():
            assert tokenizer.decode(tokens[header:]).strip() == content.strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_views_are_turns_of_their_own(loaded, name):
    tokenizer = loaded[name]
    for role, expected in zip(("user", "assistant"), VIEWS[name], strict=True):
        tokens, header = render_view(tokenizer, role, "lines with a digit")
        assert shown(tokenizer, tokens[:header]).rstrip(" ") == expected.rstrip(" ")
        assert tokenizer.decode(tokens[header:]).strip() == "lines with a digit"
    first = render_view(tokenizer, "user", TURNS[1].content)
    whole = render(tokenizer, TURNS[1:3])
    if name != "llama3":  # which puts a system block before it
        assert whole.tokens[: len(first.tokens)].tolist() == first.tokens and whole.starts[0] == 0
    assert whole.contents[0][1] - whole.contents[0][0] == len(first.tokens) - first.header


@pytest.mark.parametrize("name", FAMILIES)
def test_predictor_tokens_are_reserved_or_new(families, loaded, name, tmp_path):
    tokenizer = loaded[name]
    pieces = [tokenizer.piece(index) for index in tokenizer.predictor_ids]
    first = {
        "llama3": "<|reserved_special_token_0|>", "gemma2": "<unused0>", "olmo2": "<|extra_id_0|>",
        "mistral": "[control_8]",
    }.get(name, "<|predictor_1|>")  # fmt: skip
    assert pieces[0] == first and len(set(tokenizer.predictor_ids)) == 10
    assert bool(tokenizer.new_ids) == (first == "<|predictor_1|>")
    assert not set(tokenizer.encode("".join(pieces))) & {*tokenizer.predictor_ids, tokenizer.mask_id}
    assert tokenizer.vocab_size > max(*tokenizer.predictor_ids, tokenizer.mask_id)
    tokenizer.save(tmp_path)
    again = saved_tokenizer(tmp_path)
    assert again.predictor_ids == tokenizer.predictor_ids and again.vocab_size == tokenizer.vocab_size
    for path in families[name].iterdir():
        assert (tmp_path / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint == again.fingerprint
    assert render(copy, TURNS).tokens.tolist() == render(tokenizer, TURNS).tokens.tolist()


def test_view_ends(loaded):
    parts = view_tokens(loaded["mistral"], JepaConfig(num_predictors=2, view_end="turn"))
    assert shown(loaded["mistral"], parts.end + parts.predicted_end) == "[/INST]</s>"
    with pytest.raises(UserError, match=r"view_end`=turn: .*olmo2: the chat template has '\\n' behind user turns"):
        view_tokens(loaded["olmo2"], JepaConfig(view_end="turn"))


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3"])
def test_plain_text_and_the_places_of_its_tokens(loaded, name):
    tokenizer, text = loaded[name], "A word. Is it naïve? 日本 🙂.\nThe end."
    ids, places = tokenizer.encode_with_places(text)
    assert ids == tokenizer.encode(text) and places[0] == 0 and sorted(places) == places
    bounds = sentence_bounds(text, places)
    sentences = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert "".join(sentences).replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    assert sentences[0] == "A word." and len(sentences) >= 3
    rendered = render_document(tokenizer, ids)
    assert rendered.tokens[[0, -1]].tolist() == [tokenizer.bos_id, tokenizer.end_of_text_id]


def test_the_day_does_not_matter(families, loaded, tmp_path):
    shutil.copytree(families["llama3"], tmp_path / "dated")
    template = tmp_path / "dated" / "chat_template.jinja"
    template.write_text(template.read_text().replace("date_string is defined", "other is defined"))
    ids = render(load_tokenizer(tmp_path / "dated"), TURNS).tokens
    assert "Today Date: 26 Jul 2024" in shown(loaded["llama3"], ids)
    assert ids.tolist() == render(loaded["llama3"], TURNS).tokens.tolist()


def test_a_checkpoint_without_a_template(families, tmp_path):
    shutil.copytree(families["olmo2"], tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    bare = load_tokenizer(tmp_path / "bare" / "tokenizer.json")
    assert render_prompt(bare, [Message("user", "a word")]) == bare.encode("a word")
    with pytest.raises(UserError, match=r"no chat template for its turns; set text.chat_template .* `plain`"):
        render(bare, TURNS)
    plain = load_tokenizer(tmp_path / "bare", "plain")
    rendered = render(plain, TURNS[1:3])
    assert shown(plain, rendered.tokens) == (
        "<|endoftext|>User:\nlines with a digit?\nAssistant:\n.*[0-9].*<|endoftext|>"
    )
    assert shown(plain, rendered.tokens[rendered.assistant_target]) == ".*[0-9].*<|endoftext|>"
    assert shown(plain, render_prompt(plain, TURNS[1:2])) == "<|endoftext|>User:\nlines with a digit?\nAssistant:\n"


MISTAKES = {
    "no directory": (lambda d: shutil.rmtree(d), "No such file|no tokenizer.json and no tokenizer.model"),
    "empty": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json and no tokenizer.model there"),
    "truncated": (lambda d: cut(d / "tokenizer.json"), r"tokenizer.json: not JSON"),
    "another file": (lambda d: (d / "tokenizer.json").write_text("{}"), "has no `model.vocab`"),
    "wrong model": (lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "<|eot_id|>": 1, '
                    '"<|begin_of_text|>": 2}}}'), "tokens; |outside|cannot read it"),
    "config": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "a JSON object belongs here, not list"),
    "eos": (lambda d: edit(d / "tokenizer_config.json", eos_token="<|nope|>"), "`eos_token`='<|nope|>' is not in"),
    "no eos": (lambda d: (edit(d / "tokenizer_config.json", eos_token=None), (d / "generation_config.json").unlink()),
               "nothing says which token ends a text; set `eos_token`"),
    "ids": (lambda d: (d / "generation_config.json").write_text('{"eos_token_id": 128009}'), "128009 .* outside the"),
    "id": (lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "a"}'), "must be an id or a list"),
    "syntax": (lambda d: (d / "chat_template.jinja").write_text("{% for %}"), "not a chat template: line 1"),
    "refuses": (lambda d: (d / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), "refuses .*: no"),
    "no end": (lambda d: (d / "chat_template.jinja").write_text("{% for m in messages %}|{{ m.content }}{% endfor %}"),
               "is no control token: a model could not learn to stop"),
    "twice": (lambda d: (d / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"), r"turn 0 \(user\) more than once"),
    "drops": (lambda d: (d / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content[:2] }}{% endfor %}"), r"turn 0 \(user\) not as a whole"),
    "record": (lambda d: (d / "predictor_tokens.json").write_text('{"predictor_ids": [1]}'), "remove it to choose"),
}  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_line(families, tmp_path, name):
    directory = tmp_path / "model"
    shutil.copytree(families["llama3"], directory)
    change, expected = MISTAKES[name]
    change(directory)
    with pytest.raises(UserError, match=expected.replace("<|", r"<\|").replace("|>", r"\|>")) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value) and "model" in str(caught.value)


def test_contents_that_a_template_reads_are_refused_by_turn(loaded):
    turns = [TURNS[1], Message("assistant", "<think>\nso\n</think>\n\nor\n</think>\n\nyes")]
    with pytest.raises(UserError, match=r"content of turn 1 \(assistant\) not as a whole: '<think>"):
        render(loaded["qwen3"], turns)
    with pytest.raises(UserError, match="noncharacters of Unicode"):
        render(loaded["llama3"], [Message("user", "\ufdd05\ufdd1"), TURNS[2]])
    with pytest.raises(UserError, match="text.chat_template`=none.jinja: No such file"):
        load_tokenizer(loaded["qwen3"].files.origin, "none.jinja")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_checkpoint(request, tmp_path_factory):
    """A checkpoint with a `tokenizer.model` alone, as Llama 2 has it."""
    directory = tmp_path_factory.mktemp(request.param)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_prefix=str(directory / "tokenizer"), model_type=request.param,
        vocab_size=380, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, user_defined_symbols=USER_DEFINED if request.param == "bpe" else [],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(), ODD.map("".join)))
def test_sentencepiece_models_encode_as_sentencepiece_does(sentencepiece_checkpoint, text):
    """Where a text begins with a word; `transformers` too puts no space before a space or a user-defined piece."""
    text = "a" + text.replace("\0", "").replace("\ufdd0", "")
    tokenizer = load_sentencepiece(sentencepiece_checkpoint)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_checkpoint / "tokenizer.model"))
    ids = tokenizer.encode(text)
    assert ids == expected.encode(text)
    assert tokenizer.decode(ids) == expected.decode(ids)


@functools.cache
def load_sentencepiece(directory):
    return load_tokenizer(directory)


def test_sentencepiece_conversations(sentencepiece_checkpoint, tmp_path):
    tokenizer = load_sentencepiece(sentencepiece_checkpoint)
    rendered = render(tokenizer, TURNS[1:])
    text = shown(tokenizer, rendered.tokens).replace(" ", "")
    assert text.startswith("<s>[INST]lineswithadigit?[/INST].*[0-9].*</s><s>[INST]andthe")
    for turn, (before, last) in zip(TURNS[1:], rendered.contents, strict=True):
        assert tokenizer.decode(rendered.tokens[before + 1 : last + 1]).strip() == turn.content.strip()
    tokens, header = render_view(tokenizer, "assistant", "a word")
    assert tokens[0] == tokenizer.bos_id and tokenizer.decode(tokens[header:]).strip() == "a word"
    tokenizer.save(tmp_path)
    assert saved_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert (tmp_path / "tokenizer" / "tokenizer.model").exists()
    (tmp_path / "tokenizer" / "tokenizer.model").write_text("not a model")
    with pytest.raises(UserError, match="tokenizer.model: (not|a) .*SentencePiece model"):
        saved_tokenizer(tmp_path)


SMALL = {
    "data": {"synthetic_train": 40, "synthetic_eval": 6, "row_length": 512, "rows_per_step": 8, "row_buckets": 1},
    "model": {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_dim": 32},
    "train": {"num_steps": 2}, "eval": {"max_new_tokens": 4, "batch_size": 8},
    "log": {"report": False, "every_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_rows_hold_the_views(loaded, tmp_path, name, layout):
    """The text view with its predictor tokens and the code view, wherever the layout reads them."""
    tokenizer = loaded[name]
    objective = {"jepa": {"num_predictors": 2, "view_end": "turn"}}
    data = small_data(
        small_config(tmp_path, data={"layout": layout, "row_length": 512}, objective=objective), tokenizer
    )
    ends = {role: tokenizer.turn_end(role) for role in ("user", "assistant")}
    records = SyntheticSource("train", 60, 10)
    expected = set()
    for record in (records[i] for i in range(60)):
        views = [render_view(tokenizer, m.role, m.content).tokens for m in record.messages[-2:]]
        first = [*views[0], *tokenizer.predictor_ids[:2], ends["user"]]
        expected.add((tuple(first), (*views[1], ends["assistant"])))
    found = set()
    for row in host_rows(data):
        length = len(row["segments"])
        for pair in np.flatnonzero(row["pair_weight"]):
            texts = []
            for view in ("predictor", "code"):
                start, end = int(row[f"{view}_start"][pair]), int(row[f"{view}_index"][pair])
                tokens = row["tokens"][start : end + 1]
                if end >= length:  # on a branch
                    tokens = np.concatenate(
                        [row["tokens"][start : row["branch_end"][pair] + 1], row["tokens"][end - 2 : end + 1]]
                    )
                texts.append(tuple(tokens.tolist()))
            found.add(tuple(texts))
    if layout == "shared" and name == "llama3":  # views read behind the system block begin with their role
        expected = {(first[1:], second) for first, second in expected}
    assert found == expected


def test_a_run_with_a_checkpoints_tokenizer(families, tmp_path, capsys, name="gemma2"):
    """Two steps, then evaluation, generation, inspection and the façade; the run keeps the tokenizer's files."""
    flags = ["main", "--config=configs/tiny.py", "--config.objective.jepa.view_end=turn"]
    flags += [f"--config.{a}.{b}={value}" for a, keys in SMALL.items() for b, value in keys.items()]
    flags += [f"--config.text.tokenizer={families[name]}", f"--config.data.cache_dir={tmp_path}/cache"]
    flags += ["--config.data.layout=separate", "--config.log.tensorboard=False"]
    flags += [f"--config.train.compile_cache={CACHE}", f"--workdir={tmp_path}/run"]
    result = run([*flags, "--mode=train"])
    assert result["step"] == 2 and 0 < result["ntp_loss"] < 10 and 0 < result["jepa_loss"] < 2
    for path in families[name].iterdir():
        assert (tmp_path / "run" / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert run([*flags, "--mode=eval"])["eval_examples"] == 6
    assert len(run([*flags, "--mode=generate", "--prompt=lines with a digit"])["answers"]) == 1
    capsys.readouterr()
    run([*flags, "--mode=inspect", "--rows=1"])
    out = capsys.readouterr().out
    assert "conversation" in out and ENDS[name] in out.replace("·", "") and "plain text pos" not in out
    lm = llm_jepa_jax.load(tmp_path / "run")
    assert lm.encode(["a word"]).shape == (1, 32) and lm.run.config.model.vocab_size == lm.tokenizer.vocab_size
    assert len(lm.generate(["a word"], system="be brief")) == 1


FORMATS = {
    "a thought that only prompts open": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}"
        "{{ '<|im_end|>' + m.content + '<|endoftext|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"), ("", "<|endoftext|>"), True,
    ),
    "an end of text behind the last turn": (
        "{% for m in messages %}{{ '<|' + {'user': 'im_start', 'assistant': 'endoftext'}[m.role] + '|>\n' + m.content "
        "+ '<|im_end|>\n' }}{% endfor %}{{ '<|endoftext|>\n' if add_generation_prompt else '<|im_end|>' }}",
        ("<|im_start|>\n", "<|endoftext|>\n"), ("<|im_end|>\n<|im_end|>", "<|im_end|>\n<|im_end|>"), False,
    ),
    "a block for each part of an answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ': ' + m.content }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ ': ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{{ '<|im_start|>assistant:' if add_generation_prompt }}",
        ("<|im_start|>user: ", "<|im_start|>assistant: "), ("<|im_end|>", "<|im_end|>"), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_learnt_from_the_template(families, tmp_path, caplog, name):
    template, headers, tails, warns = FORMATS[name]
    (tmp_path / "template.jinja").write_text(template)
    tokenizer = load_tokenizer(families["qwen3"], str(tmp_path / "template.jinja"))
    found = tokenizer.chat
    assert (found.headers["user"], found.headers["assistant"]) == headers
    assert (found.tails["user"], found.tails["assistant"]) == tails
    assert ("prompts here end as conversations do" in caplog.text) == warns
    whole = render(tokenizer, TURNS[1:3])
    prompt = render_prompt(tokenizer, TURNS[1:2])
    assert whole.tokens[: len(prompt)].tolist() == prompt
    targets = shown(tokenizer, whole.tokens[whole.assistant_target])
    assert targets.removeprefix(": ") == f".*[0-9].*{tails[1].split(chr(10))[0]}"
    tokenizer.save(tmp_path)
    assert saved_tokenizer(tmp_path).chat.headers == found.headers
