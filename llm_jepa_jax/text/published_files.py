# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's files as an export has them: with tokens that a checkpoint did not know, or made from ours."""

import json
from collections.abc import Collection
from typing import Any

import tokenizers

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.checkpoint_files import CONFIG, GENERATION, MODEL, TEMPLATE, TOKENIZER, CheckpointFiles
from llm_jepa_jax.text.from_sentencepiece import convert_sentencepiece
from llm_jepa_jax.text.interface import TOKEN_IDS

ADDED = "added_tokens.json"
DECODER = "added_tokens_decoder"
"""Of `tokenizer_config.json`: added tokens by id."""
INSTEAD = "export without the rows of new tokens (predictor_rows=drop)"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def with_added_tokens(files: CheckpointFiles, added: dict[int, str], known: Collection[str]) -> dict[str, bytes]:
    """Those files that name added tokens, with these among them: `tokenizer.json`, where there is one, and what
    `tokenizer_config.json` and `added_tokens.json` hold besides. `known` are the pieces of the vocabulary.

    Raises:
        UserError: `tokenizers` would give a token another id, or the checkpoint has its spelling already.
    """
    taken = [token for token in added.values() if token in known]
    if taken:
        raise UserError(f"{files.origin}: has a token {taken[0]} already; {INSTEAD}")
    changed: dict[str, bytes] = {}
    if TOKENIZER in files.contents:
        value = files.json(TOKENIZER)
        value["added_tokens"] = [*(value.get("added_tokens") or []), *({"id": i, "content": t, **FLAGS} for i, t in
                                                                       added.items())]  # fmt: skip
        changed[TOKENIZER] = _json(value)
        read = tokenizers.Tokenizer.from_str(changed[TOKENIZER].decode())
        for index, token in added.items():
            if read.token_to_id(token) != index:
                raise UserError(
                    f"{files.origin}/{TOKENIZER}: {token} would be id {read.token_to_id(token)}, not the {index} that "
                    f"the run was trained with; {INSTEAD}"
                )
    config = files.json(CONFIG)
    if DECODER in config or TOKENIZER not in files.contents:
        entries = {str(index): {"content": token, **FLAGS} for index, token in added.items()}
        changed[CONFIG] = _json(config | {DECODER: config.get(DECODER, {}) | entries})
    if ADDED in files.contents:
        changed[ADDED] = _json(files.json(ADDED) | {token: index for index, token in added.items()})
    return changed


def files_of_ours(
    model: bytes, special_tokens: dict[str, str], template: str, ids: dict[str, int | list[int]]
) -> dict[str, bytes]:
    """What `transformers` needs to encode as a SentencePiece model of ours does, and that model.

    `special_tokens` are named as in `tokenizer_config.json`, `template` is the Jinja source of the chat format, and
    `ids` are those of `TOKEN_IDS`.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        **special_tokens,
    }  # fmt: skip
    return {
        MODEL: model,
        TOKENIZER: _json(convert_sentencepiece(CheckpointFiles(MODEL, {MODEL: model}))),
        CONFIG: _json(config),
        TEMPLATE: template.encode(),
        GENERATION: _json({name: ids[name] for name in TOKEN_IDS}),
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
