"""A Scorable as a model of lm-evaluation-harness.

A text begins a document: contexts are encoded with a BOS in front, as in training.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from data.errors import InputError
from eval.models import Scorable
from eval.scoring import document_windows

# What lm-eval hands over: the texts (for the cache), the tokens of the context, those to score.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Log-likelihoods and greedy texts of a Scorable, in batches of similar length."""

    def __init__(
        self, model: Scorable, batch_size: int, max_length: int, device: torch.device
    ) -> None:
        super().__init__()
        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        self._device = device

    @property
    def eot_token_id(self) -> int:
        """What separates documents: BOS; lm-eval puts it before a text without a context."""
        return self.model.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, after a BOS unless add_special_tokens is False."""
        if add_special_tokens is False:
            return self.model.tokenizer.encode(string)
        return self.model.tokenizer.encode_document(string)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability in nats of its continuation after its context, and
        whether that is what greedy decoding gives. What is too long loses its beginning.
        """
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="requests", disable=disable_tqdm) as bar:
            for begin in range(0, len(order), self.batch_size):
                places = order[begin : begin + self.batch_size]
                rows = [(requests[i][1] + requests[i][2], len(requests[i][2])) for i in places]
                for place, result in zip(places, self._score(rows), strict=True):
                    results[place] = result
                    texts = requests[place][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, result)
                bar.update(len(places))
        return results

    def _score(self, rows: list[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """Tokens, and how many of the last to score -> sum of log-probabilities, all greedy."""
        kept = [ids[-(self.max_length + 1) :] for ids, _ in rows]
        width = max(len(ids) for ids in kept) - 1
        inputs = torch.zeros(len(rows), max(width, 1), dtype=torch.int64)
        for row, ids in zip(inputs, kept, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.int64)
        logits = self.model.logits(inputs.to(self._device))  # (B, T, vocab_size)
        for row, ids, (_, count) in zip(logits, kept, rows, strict=True):
            if count == 0:
                yield 0.0, True
                continue
            count = min(count, len(ids) - 1)
            wanted = torch.tensor(ids[-count:], device=row.device)
            scored = row[len(ids) - 1 - count : len(ids) - 1]  # (count, vocab_size)
            found = torch.log_softmax(scored.double(), dim=-1)
            total = found.gather(1, wanted[:, None]).sum()
            yield float(total), bool((scored.argmax(dim=-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each text as a document of its own, in windows of
        max_length: what eval.perplexity --per_document sums.
        """
        texts = [request.args[0] for request in requests]
        pieces: list[Request] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = self.model.tokenizer.encode_document(text)
            start = torch.zeros(1, dtype=torch.int64).numpy()
            for one in document_windows(start, len(ids), self.max_length, self.max_length, None):
                pieces.append(
                    (None, ids[one.start : one.first + 1], ids[one.first + 1 : one.end + 1])
                )
                owners.append(number)
        totals = [0.0] * len(texts)
        found = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)
        for owner, (nats, _) in zip(owners, found, strict=True):
            totals[owner] += nats
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to a stop string, max_gen_toks tokens or the end of the document."""
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, options = request.args
            if options.get("do_sample") or options.get("temperature", 0.0):
                raise InputError("--tasks: a task asks for sampling; only greedy decoding is here")
            text = self._continue(context, options.get("until", []), options.get("max_gen_toks"))
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _continue(self, context: str, until: list[str] | str, most: int | None) -> str:
        most = min(most or 256, self.max_length - 1)
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        new: list[int] = []
        for token in self.model.greedy(ids, most):
            if token in (self.model.tokenizer.bos_id, self.model.tokenizer.eos_id):
                break
            new.append(token)
            text = self.model.tokenizer.decode(new)
            places = [text.find(stop) for stop in stops if stop in text]
            if places:
                return text[: min(places)]
        return self.model.tokenizer.decode(new)
