"""The exported tokenizer gives the ids of SentencePiece, for every text tried."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.errors import InputError
from data.tokenizer import SPACE_MARK, Tokenizer
from model.export.probes import ODD
from model.export.tokenizer import pad_id, write_tokenizer


@pytest.fixture(scope="module")
def ours_and_theirs(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(tokenizer, 64, folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_our_ids(ours_and_theirs: tuple[Tokenizer, Any], text: str):
    ours, theirs = ours_and_theirs
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs(text).input_ids == ours.encode_document(text)
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


# Few characters, so that pieces that overlap with themselves come often.
FEW = st.text(st.sampled_from(list(" \n\tae=-sx0.\u2581\0é")), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(FEW, st.text(max_size=40)))
def test_any_text_has_our_ids(ours_and_theirs: tuple[Tokenizer, Any], text: str):
    ours, theirs = ours_and_theirs
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_real_texts_and_shuffled_ones_have_our_ids(
    ours_and_theirs: tuple[Tokenizer, Any], sample: list[str]
):
    ours, theirs = ours_and_theirs
    generator = random.Random(0)
    for text in sample:
        words = text[:4000].split(" ")
        mixed = " ".join(generator.sample(words, len(words)))
        for one in (text[:20000], mixed):
            assert theirs.backend_tokenizer.encode(one, add_special_tokens=False).ids == (
                ours.encode(one)
            )


def test_special_tokens_are_ours(ours_and_theirs: tuple[Tokenizer, Any]):
    ours, theirs = ours_and_theirs
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 64
    assert theirs.decode(ours.encode_document("ab"), skip_special_tokens=True) == "ab"
    batch = theirs(["a", "a b c d"], padding=True, return_tensors="pt")
    assert batch.input_ids[0, 0] == theirs.pad_token_id == pad_id(ours)
    assert batch.attention_mask[0, 0] == 0


def foreign(folder: Path, lines: list[str], **options: Any) -> Tokenizer:
    """A tokenizer of SentencePiece's own defaults, which are not ours."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=500, minloglevel=2,
        **{"model_type": "bpe", "num_threads": 1, **options},
    )  # fmt: skip
    (folder / "foreign.model").write_bytes(model.getvalue())
    return Tokenizer(folder / "foreign.model")


FOREIGN: list[dict[str, Any]] = [
    {},  # nmt_nfkc, a space in front, extra spaces removed, characters may be unknown
    {"byte_fallback": True, "control_symbols": ["<cls>"], "pad_id": 3},
    {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
     "byte_fallback": True},  # Llama's and Mistral's first
    {"unk_piece": "[U]", "bos_piece": "[B]", "eos_id": -1},
]  # fmt: skip


@pytest.fixture(scope="module")
def lines(sample: list[str]) -> list[str]:
    return [line for text in sample for line in text.split("\n") if line][:3000]


@pytest.mark.parametrize("options", FOREIGN)
def test_foreign_tokenizers_have_their_ids(
    options: dict[str, Any], lines: list[str], tmp_path: Path
):
    ours = foreign(tmp_path, lines, **options)
    write_tokenizer(ours, 64, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*ODD, *lines[:200]):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs("ab").input_ids == ours.encode_document("ab")
    assert theirs.eos_token_id == (ours.eos_id if ours.eos_id >= 0 else None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "gives other ids for"),
        ({"user_defined_symbols": ["XY"]}, "gives other ids for"),  # behind a prefixed space
    ],
)
def test_what_would_get_other_ids_is_refused(
    options: dict[str, Any], expected: str, lines: list[str], tmp_path: Path
):
    ours = foreign(tmp_path, lines, **options)
    with pytest.raises(InputError, match=expected):
        write_tokenizer(ours, 64, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_defined_symbols_are_cut_out(lines: list[str], tmp_path: Path):
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    plain |= {"add_dummy_prefix": False, "byte_fallback": True}
    ours = foreign(tmp_path, lines, user_defined_symbols=["XY", "<|im|>"], **plain)
    write_tokenizer(ours, 64, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "a XY<|im|>b XYXY"
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text)
    pieces = ours._processor.id_to_piece(ids)
    assert pieces.count("XY") == 3
    assert SPACE_MARK in "".join(pieces)
    added = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    defined = [one["content"] for one in added.values() if not one["special"]]
    assert defined == ["XY", "<|im|>"], "llama.cpp's converter reads them here"


@pytest.mark.parametrize("prefixed", [False, True])
def test_other_programs_find_what_they_read(prefixed: bool, lines: list[str], tmp_path: Path):
    """transformers 4: the class and what a call returns; llama.cpp: the space in front."""
    ours = foreign(tmp_path, lines, add_dummy_prefix=prefixed, byte_fallback=True)
    write_tokenizer(ours, 64, tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found["add_prefix_space"] is prefixed
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert set(theirs("a b")) == {"input_ids", "attention_mask"}
    assert theirs("a b").input_ids == ours.encode_document("a b")
