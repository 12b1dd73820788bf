import hashlib
import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.encode import Batch, Encoder, SplitRule, encode_in_order
from data.errors import InputError
from tests.data.conftest import make_texts

RULE = SplitRule(seed=3, valid_fraction=0.2, test_fraction=0.1)


def batches(count: int = 12) -> list[Batch]:
    """Batches of 0 to 3 documents; every fifth document is empty."""
    texts = make_texts(count * 3, words=24)
    texts[::5] = [" \n"] * len(texts[::5])
    return [
        Batch(texts[3 * i : 3 * i + i % 4], "valid" if i % 6 == 5 else None, i, i % 2 == 0)
        for i in range(count)
    ]


def test_encoder_agrees_with_the_tokenizer(model_file, tokenizer):
    encoder = Encoder(model_file, RULE)
    for batch in batches():
        encoded = encoder(batch)
        expected = [tokenizer.encode_document(t) if t.strip() else [] for t in batch.texts]
        assert encoded.tokens.tolist() == [token for ids in expected for token in ids]
        assert encoded.tokens.dtype == np.uint16
        assert encoded.lengths == [len(ids) for ids in expected]
        assert encoded.bytes == [len(text.encode()) for text in batch.texts]
        assert encoded.words == [len(text.split()) for text in batch.texts]
        assert encoded.splits == [batch.split or RULE.split(text) for text in batch.texts]
        assert (encoded.source, encoded.ends_source) == (batch.source, batch.ends_source)


def test_processes_change_nothing_and_look_ahead_is_bounded(model_file):
    taken = 0

    def counted():
        nonlocal taken
        for batch in batches(30):
            taken += 1
            yield batch

    alone = list(encode_in_order(batches(30), model_file, RULE, 1))
    for done, (one, other) in enumerate(
        zip(alone, encode_in_order(counted(), model_file, RULE, 2), strict=True)
    ):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.lengths, one.splits) == (other.lengths, other.splits)
        assert taken - done <= 2 * 2 + 2


def test_a_killed_worker_is_reported(model_file, monkeypatch):
    def kill_workers():
        import multiprocessing

        yield batches()[3]
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        yield from batches(40)

    with pytest.raises(InputError, match="process died, most likely out of memory; use fewer"):
        list(encode_in_order(kill_workers(), model_file, RULE, 2))


def test_a_worker_that_cannot_be_started_is_reported(model_file, monkeypatch):
    """As seen once: a worker was being started when the pool had closed the pipes of a dead one."""

    def refuse(*_):
        raise ValueError("bad value(s) in fds_to_keep")

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", refuse)
    with pytest.raises(InputError, match="process died"):
        list(encode_in_order(batches(), model_file, RULE, 2))


def test_split_rule_is_the_documented_one():
    for text in make_texts(300, words=12):
        digest = hashlib.blake2b(b"3\0" + text.encode(), digest_size=8).digest()
        draw = int.from_bytes(digest, "little") / 2**64
        expected = "test" if draw < 0.1 else "valid" if draw < 0.1 + 0.2 else "train"
        assert RULE.split(text) == expected


def test_split_shares_and_seed():
    texts = [str(n) for n in range(4000)]
    splits = [RULE.split(text) for text in texts]
    assert abs(splits.count("valid") / 4000 - 0.2) < 0.03
    assert abs(splits.count("test") / 4000 - 0.1) < 0.03
    assert [SplitRule(4, 0.2, 0.1).split(text) for text in texts] != splits


@given(st.text())
def test_fractions_of_zero_are_zero(text):
    assert SplitRule(0, 0.0, 0.0).split(text) == "train"
