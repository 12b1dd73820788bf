"""Metrics of predictions, by scikit-learn, scipy, rouge_score and sacrebleu."""

import re
import string
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.errors import InputError
from eval.finetune.tasks import Task


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predicted classes (n,) that are right."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where neither predictions nor labels have it."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient; 0 where all predictions are one class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0 where all predictions are equal, for which it is not defined."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where all predictions are equal."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(of: Callable[..., Any], predictions: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():  # of predictions that are nearly equal
        warnings.simplefilter("ignore")
        value = float(of(predictions, labels).statistic)
    return value if np.isfinite(value) else 0.0


def normalised(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, without punctuation and articles,
    single spaces.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of texts equal to their answer after SQuAD's normalisation."""
    same = [normalised(p) == normalised(a) for p, a in zip(predictions, answers, strict=True)]
    return float(np.mean(same))


def rouge(kind: str, predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Mean F-measure of "rouge1", "rouge2" or "rougeL", with stemming, as rouge_score has it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError(
            f"{kind}: needs the package rouge-score; pip install rouge-score"
        ) from None
    scorer = RougeScorer([kind], use_stemmer=True)
    pairs = zip(answers, predictions, strict=True)
    return float(np.mean([scorer.score(a, p)[kind].fmeasure for a, p in pairs]))


def bleu(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, with sacrebleu's defaults."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise InputError("bleu: needs the package sacrebleu; pip install sacrebleu") from None
    return float(corpus_bleu(list(predictions), [list(answers)]).score)


_OF_NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman,
}  # fmt: skip


def measure(task: Task, predictions: Any, labels: Any) -> dict[str, float]:
    """The metrics of a task. predictions: classes (n,), numbers (n,), or n texts."""
    found = {}
    for name in task.metrics:
        if name in _OF_NUMBERS:
            found[name] = _OF_NUMBERS[name](np.asarray(predictions), np.asarray(labels))
        elif name == "exact_match":
            found[name] = exact_match(predictions, labels)
        elif name == "bleu":
            found[name] = bleu(predictions, labels)
        else:
            found[name] = rouge(name, predictions, labels)
    return found
