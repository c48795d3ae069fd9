# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's SentencePiece `tokenizer.model` as a `tokenizer.json`, where it comes without one (Llama 2, Gemma)."""

import base64
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.checkpoint_files import CONFIG, MODEL, CheckpointFiles

SPACE = "▁"


def convert_sentencepiece(files: CheckpointFiles) -> dict[str, Any]:
    """The parsed `tokenizer.json` that encodes as the model does, with control and user-defined pieces as added tokens.

    A space comes before the text where the model puts one, once: not behind control tokens. User-defined pieces are
    found from the left, the longest first, as BPE models do; unigram models weigh them against what overlaps them.

    Raises:
        UserError: the file is not a SentencePiece model, or of a kind other than BPE and unigram.
    """
    from sentencepiece import sentencepiece_model_pb2  # protobuf, wanted only here

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(files.contents[MODEL])
    except Exception as error:  # protobuf's own classes differ by version
        raise UserError(f"{files.origin}/{MODEL}: not a SentencePiece model; copy it anew") from error
    if not proto.pieces:
        raise UserError(f"{files.origin}/{MODEL}: a SentencePiece model without pieces; copy it anew")
    spec, piece = proto.trainer_spec, proto.pieces[0].Type
    if spec.model_type not in (spec.BPE, spec.UNIGRAM):
        kind = spec.ModelType.Name(spec.model_type)
        raise UserError(f"{files.origin}/{MODEL}: a SentencePiece model of type {kind}; BPE and UNIGRAM can be read")
    scores = [(entry.piece, entry.score) for entry in proto.pieces]
    unknown = next((i for i, entry in enumerate(proto.pieces) if entry.type == piece.Value("UNKNOWN")), 0)
    if spec.model_type == spec.BPE:
        model = _bpe(scores, scores[unknown][0], spec.byte_fallback)
    else:
        model = {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": spec.byte_fallback}
    kinds = {piece.Value("CONTROL"): True, piece.Value("UNKNOWN"): True, piece.Value("USER_DEFINED"): False}
    # With a space in it, a piece is found nowhere: spaces are written otherwise by then.
    named = [(i, entry) for i, entry in enumerate(proto.pieces) if entry.type in kinds and " " not in entry.piece]
    added = [_added(i, entry.piece, kinds[entry.type]) for i, entry in named]
    added += [_added(index, text, False) for text, index in sorted(files.json("added_tokens.json").items())]
    config, normalizer = files.json(CONFIG), proto.normalizer_spec
    prefix = bool(config.get("add_prefix_space", normalizer.add_dummy_prefix))
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": _normalizer(normalizer, files),
        "pre_tokenizer": {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first" if prefix else "never", "split": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": model,
    }  # fmt: skip


def _bpe(scores: list[tuple[str, float]], unknown: str, byte_fallback: bool) -> dict[str, Any]:
    """BPE by ranks: SentencePiece merges the best-scored piece first, whichever two pieces make it."""
    ids = {piece: index for index, (piece, _) in enumerate(scores)}
    merges = []
    for index, (piece, score) in enumerate(scores):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(-score, index, ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    merges.sort()
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": False,
        "vocab": ids, "merges": [[a, b] for *_, a, b in merges],
    }  # fmt: skip


def _normalizer(spec: Any, files: CheckpointFiles) -> dict[str, Any]:
    """SentencePiece's own character map, and spaces as it writes them: user-defined pieces are found among those."""
    if spec.remove_extra_whitespaces:
        raise UserError(
            f"{files.origin}/{MODEL}: the model removes white space from text, which cannot be kept apart from a "
            "conversation's; save the tokenizer as tokenizer.json and name that"
        )
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": charsmap})
    return {"type": "Sequence", "normalizers": steps}


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": index, "content": content, "special": special, **flags}
