import hashlib
import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.tokenizer import Tokenizer, train_tokenizer
from tests.data.conftest import make_texts

AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "\t\tx",
    "  a   b  ",
    "a\r\nb",
    "emoji 😀 é 漢字",
    "\0",
    "<s></s><unk>",
]
# SentencePiece writes a space as U+2581, so it cannot tell one from the other.
any_text = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))


def write_model(path, **options):
    """A model with settings that our trainer does not offer."""
    model = io.BytesIO()
    lines = iter("\n".join(make_texts(50)).split("\n"))
    defaults = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **{**defaults, **options}
    )
    path.write_bytes(model.getvalue())
    return path


def test_agrees_with_sentencepiece(tokenizer, model_file):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    text = make_texts(1)[0]
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.encode_document(text) == [oracle.bos_id(), *oracle.encode(text)]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (420, 1, 2)
    assert oracle.unk_id() == 0
    assert oracle.pad_id() == -1
    assert tokenizer.sha256 == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert tokenizer.path == model_file


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(any_text | st.text("ab \n\t", max_size=40))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_document(text)) == text


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts.dtype == np.int32
    assert counts[tokenizer.encode_document(text)].sum() == len(text.encode())


def test_token_bytes_of_special_tokens(tokenizer, model_file):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    counts = tokenizer.token_bytes()
    assert counts[:3].tolist() == [0, 0, 0]
    assert counts[oracle.piece_to_id("<0x0A>")] == 1
    assert counts[oracle.piece_to_id("\u2581")] == 1


def test_digits_are_split(tmp_path):
    train_tokenizer(["1234 " * 500, *make_texts(20)], tmp_path / "m", 320)
    assert len(Tokenizer(tmp_path / "m").encode("1234")) == 4


def test_long_lines_are_learned_from(tmp_path):
    """The trainer drops lines over 4192 bytes; a word that stands only in one must be learned."""
    line = "zyxwvq " * 3000
    train_tokenizer([line, *make_texts(20)], tmp_path / "m", 350)
    assert len(Tokenizer(tmp_path / "m").encode("zyxwvq")) <= 2


def test_sample_is_capped(tmp_path):
    texts = iter(make_texts(1000))
    train_tokenizer(texts, tmp_path / "m", 300, sample_bytes=20_000)
    assert next(texts, None) is not None


def test_training_leaves_nothing_but_the_model_and_prints_nothing(tmp_path, capfd):
    train_tokenizer(make_texts(50), tmp_path / "m", 300)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert capfd.readouterr() == ("", "")


def test_training_is_reproducible(tmp_path, model_file):
    train_tokenizer(make_texts(200), tmp_path / "m", vocab_size=420)
    assert (tmp_path / "m").read_bytes() == model_file.read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(100_000, r"too large .* at most \d+$"), (100, r"too small.* at least \d+$")],
)
def test_vocab_size_out_of_range(tmp_path, vocab_size, message):
    with pytest.raises(InputError, match=message) as error:
        train_tokenizer(make_texts(20), tmp_path / "m", vocab_size)
    allowed = int(str(error.value).split()[-1])
    train_tokenizer(make_texts(20), tmp_path / "m", allowed)  # what it says is true
    assert Tokenizer(tmp_path / "m").vocab_size == allowed


def test_no_text_to_train_on(tmp_path):
    with pytest.raises(InputError, match="sample is empty"):
        train_tokenizer(["\n"], tmp_path / "m", 300)


def test_a_readers_error_comes_through_training(tmp_path):
    def texts():
        yield "some text"
        raise InputError("line 2 is bad")

    with pytest.raises(InputError, match=r"^line 2 is bad$"):
        train_tokenizer(texts(), tmp_path / "m", 300)


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "text", "truncated", "no BOS"])
def test_bad_model_files(case, tmp_path, model_file, refused):
    path = tmp_path / "bad.model"
    if case == "folder":
        path.mkdir()
    elif case == "no BOS":
        write_model(path, bos_id=-1)
    elif case != "missing":
        content = {"empty": b"", "text": b"hello", "truncated": model_file.read_bytes()[:2000]}
        path.write_bytes(content[case])
    (tmp_path / "a.txt").write_text("some text")
    message = refused("--input", tmp_path / "a.txt", tokenizer=path)
    assert f"tokenizer {path}: " in message
    expected = {"missing": "no such file", "folder": "is a directory", "empty": "is empty"}
    expected |= {"text": "not a SentencePiece", "truncated": "not a SentencePiece"}
    assert expected.get(case, "no BOS id") in message


def test_a_foreign_tokenizer_with_a_dummy_prefix(tmp_path):
    path = write_model(tmp_path / "m", bos_id=5, eos_id=-1, unk_id=0)
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (5, -1)
    assert tokenizer.encode_document("a")[0] == 5
