"""A SentencePiece BPE model as a tokenizer of Hugging Face, with the same ids.

SentencePiece joins the neighbours whose union has the best score, the leftmost of equals (Sennrich
et al. 2016, with scores as ranks). The package tokenizers has no scores but an order of pairs, so
every way to split a piece becomes a pair, in the order of the pieces' scores.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.tokenizer import SPACE_MARK, Tokenizer
from model.export.probes import texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type; 6 is BYTE
_BPE = 2  # TrainerSpec.ModelType


def write_tokenizer(source: Tokenizer, max_length: int, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for transformers, and tokenizer.model.

    InputError where the ids would not be ours: models that are not BPE, or that normalise in a way
    that has no counterpart.
    """
    from transformers import PreTrainedTokenizerFast

    proto = _proto(source.path)
    pieces = [piece.piece for piece in proto.pieces]
    backend = _backend(proto, source)
    named = {"unk_token": pieces[proto.trainer_spec.unk_id], "bos_token": pieces[source.bos_id]}
    if source.eos_id >= 0:
        named["eos_token"] = pieces[source.eos_id]
    pad = pad_id(source, proto)
    if pad is not None:
        named["pad_token"] = pieces[pad]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        padding_side="left",  # for generation
        # A text that spells <s> is a text: SentencePiece never reads a control token from it.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **named,
    )
    _check_ids(fast, source, pieces)
    fast.save_pretrained(folder)
    amend(folder / "tokenizer_config.json", _for_others(proto, folder))
    (folder / "tokenizer.model").write_bytes(source.path.read_bytes())


def _for_others(proto: Any, folder: Path) -> dict[str, Any]:
    """Keys of tokenizer_config.json that transformers 5 does not write and other programs read."""
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return {
        # llama.cpp's converter: whether a space goes in front, and which pieces are cut out first.
        "add_prefix_space": bool(proto.normalizer_spec.add_dummy_prefix),
        "added_tokens_decoder": {str(one.pop("id")): one for one in added},
        # transformers 4 knows the class by this name, and else hands token_type_ids to generate().
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def amend(path: Path, changes: Mapping[str, Any]) -> None:
    """Sets keys of a JSON object in a file."""
    fields = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pad_id(source: Tokenizer, proto: Any = None) -> int | None:
    """The id that fills up a batch: the model's own for padding, else EOS; None: it has neither."""
    proto = proto or _proto(source.path)
    own: int = proto.trainer_spec.pad_id
    if own >= 0:
        return own
    return source.eos_id if source.eos_id >= 0 else None


def _proto(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # it makes its classes as it is imported
    proto = messages.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _backend(proto: Any, source: Tokenizer) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    if proto.trainer_spec.model_type != _BPE:
        raise InputError(
            f"{source.path}: is not a BPE model of SentencePiece, the one kind that this format "
            "takes; allowed is --format safetensors"
        )
    unknown = [piece.piece for piece in proto.pieces if piece.type == UNKNOWN]
    backend = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=merges(proto),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=bool(proto.trainer_spec.byte_fallback),
        )
    )
    backend.normalizer = _normalizer(proto)
    prefixed = proto.normalizer_spec.add_dummy_prefix
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefixed else steps
    )
    bos = proto.pieces[source.bos_id].piece
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, source.bos_id)]
    )
    special = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in special])
    # SentencePiece cuts these out before it joins anything.
    defined = [p.piece.replace(SPACE_MARK, " ") for p in proto.pieces if p.type == USER_DEFINED]
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in defined])
    return backend


def _normalizer(proto: Any) -> Any:
    """What SentencePiece does to a text before it looks for pieces."""
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    return normalizers.Sequence(steps)


def merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces whose union is a piece, best score first.

    Pairs of one piece tie in SentencePiece, where the leftmost wins, and cannot tie here: every
    export compares ids on the probes, and refuses a tokenizer that differs.
    """
    joined = {p.piece: p.score for p in proto.pieces if p.type in (NORMAL, UNUSED)}
    found = []
    for piece, score in joined.items():
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in joined and piece[cut:] in joined:
                found.append((-score, piece[:cut], piece[cut:]))
    found.sort(key=lambda one: one[0])  # stable
    return [(left, right) for _, left, right in found]


def _check_ids(fast: Any, source: Tokenizer, pieces: list[str]) -> None:
    """InputError where a text of the probes gets other ids than ours."""
    for text in texts([piece.replace(SPACE_MARK, " ") for piece in pieces]):
        if fast.encode(text, add_special_tokens=False) != source.encode(text):
            raise InputError(
                f"{source.path}: the tokenizer of Hugging Face gives other ids for {text[:40]!r}; "
                "allowed is --format safetensors"
            )
