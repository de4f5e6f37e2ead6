"""What sentence vectors are worth: do pairs score higher than non-pairs of the same domain, and is the partner found
among all.

The evaluation of arXiv 2401.15713 - F1 of the cosine at a threshold, ROC-AUC, mean similarities and their ratio, on as
many non-pairs as pairs - with two differences: the threshold is chosen on the validation split, not on the pairs that
are judged, and a non-pair's texts are of one domain, so that to know the domain is not enough. TF-IDF of the same words
stands beside the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from research.errors import UserError
from research.modules.state import Arrays, apply, told


@dataclass(frozen=True)
class Vectors:
    """Of N pairs: vectors of length 1 of the first and the second texts, and the domains."""

    a: Float[np.ndarray, "N D"]
    b: Float[np.ndarray, "N D"]
    domain: Int[np.ndarray, " N"]

    def of(self, domain: int | None) -> "Vectors":
        """The pairs of one domain; None: all."""
        chosen = np.ones(len(self.domain), bool) if domain is None else self.domain == domain
        return Vectors(self.a[chosen], self.b[chosen], self.domain[chosen])


def embed(
    model: tuple[Any, Arrays, Arrays], source: Any, task: Any, *, pairs: int, turn: int = 0, batch: int = 64
) -> Vectors:
    """Returns the vectors of the first `pairs` pairs of a source.

    Args:
      model: config, params and stats of an encoder.
      source: pairs of texts.
      task: the contrastive task, which says how pairs become inputs.
      turn: added to every domain, modulo their number: 1 asks another domain's experts.
      batch: pairs at a time.
    """
    config, params, stats = model
    run = jax.jit(lambda p, s, block: apply(config, p, s, *task.inputs(block), **told(config, task.real(block)))[0])
    count, rows = min(pairs, len(source)), []
    for start in range(0, count, batch):
        places = np.arange(start, start + batch)
        block = source.gather(np.minimum(places, count - 1))  # the last one fills up
        config.check_domain(block["domain"], source.name)
        block = {**block, "domain": (block["domain"] + turn) % config.num_domains, "mask": places < count}
        rows.append(np.asarray(run(params, stats, block), np.float64).reshape(batch, 2, -1))
    vectors = _unit(np.concatenate(rows)[:count])
    return Vectors(vectors[:, 0], vectors[:, 1], source.gather(np.arange(count))["domain"])


def tf_idf(source: Any, train: Any, *, pairs: int) -> Vectors:
    """Returns the baseline's vectors: counts of words times log((1 + N) / (1 + n)) + 1, n of the N training texts
    holding the word."""
    idf = np.zeros(train.vocab_size)
    block = train.gather(np.arange(len(train)))
    for tokens in block["pairs"].reshape(-1, block["pairs"].shape[-1]):
        idf[np.unique(tokens)] += 1
    idf = np.log((1 + 2 * len(train)) / (1 + idf)) + 1
    block = source.gather(np.arange(min(pairs, len(source))))
    tokens = block["pairs"].reshape(-1, block["pairs"].shape[-1])
    counts = np.zeros((len(tokens), train.vocab_size))
    np.add.at(counts, (np.arange(len(tokens))[:, None], tokens), 1)
    counts[:, 0] = 0  # padding and the place of the domain's token
    vectors = _unit(counts * idf).reshape(-1, 2, train.vocab_size)
    return Vectors(vectors[:, 0], vectors[:, 1], block["domain"])


def _unit(x: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def scored_pairs(vectors: Vectors) -> tuple[Float[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """Returns cosines and whether the texts belong together: each pair, and its first text with the next pair's second
    text of the same domain, in the source's order. Domains of a single pair are left out."""
    scores, labels = [], []
    for domain in np.unique(vectors.domain):
        part = vectors.of(domain)
        if len(part.a) > 1:
            for b, label in ((part.b, True), (np.roll(part.b, -1, 0), False)):
                scores.append((part.a * b).sum(-1))
                labels.append(np.full(len(b), label))
    return np.concatenate([np.empty(0), *scores]), np.concatenate([np.empty(0, bool), *labels])


def best_threshold(scores: Float[np.ndarray, " M"], labels: Bool[np.ndarray, " M"]) -> float:
    """Returns the score from which on calling texts a pair gives the largest F1; the highest such score.

    Raises:
      UserError: there is no pair to choose it on.
    """
    if not labels.any():
        raise UserError("no domain has two validation pairs, from which the threshold of F1 is chosen")
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(labels[order])
    f1 = 2 * right / (np.arange(1, len(scores) + 1) + labels.sum())
    last = np.append(scores[order][1:] != scores[order][:-1], True)  # equal scores are called alike
    return float(scores[order][np.argmax(np.where(last, f1, -1.0))])


def at_threshold(scores: Float[np.ndarray, " M"], labels: Bool[np.ndarray, " M"], threshold: float) -> dict[str, float]:
    """Returns f1, precision and recall of calling a pair what scores `threshold` or more; 0 where nothing is called or
    there."""
    called = scores >= threshold
    right = float((called & labels).sum())
    ratio = lambda n: right / n if n else 0.0
    return {
        "f1": ratio((called.sum() + labels.sum()) / 2),
        "precision": ratio(called.sum()),
        "recall": ratio(labels.sum()),
    }


def roc_auc(scores: Float[np.ndarray, " M"], labels: Bool[np.ndarray, " M"]) -> float:
    """Returns the chance that a pair scores higher than a non-pair, ties counting half; NaN without both."""
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        return float("nan")
    below, upto = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(negative))


def retrieval(vectors: Vectors) -> float:
    """Returns the share of first texts whose nearest second text is their own, among all second texts given."""
    return float(((vectors.a @ vectors.b.T).argmax(1) == np.arange(len(vectors.a))).mean())


def judge(test: Vectors, validation: Vectors, domains: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row for each domain that has two test pairs, and one for all together.

    `pairs`, `f1`, `precision`, `recall` at `threshold` (chosen on the row's validation pairs), `auc`, mean cosine of
    the pairs (`positive`) and the others (`negative`), their `ratio`, and `retrieval`: accuracy@1 among the row's test
    pairs.

    Raises:
      UserError: no validation pairs.
    """
    rows = []
    for index, name in [*enumerate(domains), (None, "all")]:
        part, held = test.of(index), validation.of(index)
        if len(part.a) < 2:
            continue
        scores, labels = scored_pairs(part)
        threshold = best_threshold(*scored_pairs(held))
        positive, negative = float(scores[labels].mean()), float(scores[~labels].mean())
        found = {"threshold": threshold, "auc": roc_auc(scores, labels), "positive": positive, "negative": negative}
        found |= {"ratio": positive / negative if negative else float("nan"), "retrieval": retrieval(part)}
        rows.append({"domain": name, "pairs": len(part.a)} | at_threshold(scores, labels, threshold) | found)
    return rows


def compare(
    model: tuple[Any, Arrays, Arrays], splits: Mapping[str, Any], task: Any, *, pairs: int
) -> list[dict[str, Any]]:
    """Returns the rows of `judge` of the model, of the model asked through the next domain's experts, and of TF-IDF.

    Args:
      model: config, params and stats of an encoder.
      splits: the sources of pairs, of which the training split only counts the baseline's words.
      task: the contrastive task.
      pairs: of each split, the most to take.
    """
    test, validation = splits["test"], splits["validation"]
    for source in (test, validation):
        if not len(source):
            raise UserError(
                f"{source.name} has no pairs; F1 is judged on test pairs at a threshold chosen on validation pairs"
            )
    ways = {"model": lambda source: embed(model, source, task, pairs=pairs)}
    if model[0].num_domains > 1:
        ways["next domain"] = lambda source: embed(model, source, task, pairs=pairs, turn=1)
    ways["tf-idf"] = lambda source: tf_idf(source, splits["train"], pairs=pairs)
    return [
        {"by": name, **row} for name, way in ways.items() for row in judge(way(test), way(validation), test.domains)
    ]


def nearest(
    model: tuple[Any, Arrays, Arrays], source: Any, query: str, domain: str | None, *, task: Any, count: int = 5
) -> list[tuple[float, str]]:
    """Returns (cosine, text) of the second texts of a domain that are nearest to a query, best first.

    Args:
      model: config, params and stats of an encoder.
      source: pairs of texts, whose second ones are searched.
      query: a text.
      domain: its name or number; None where there is only one.
      task: the contrastive task.
      count: how many to return.

    Raises:
      UserError: a domain that no expert has, or no word in the query.
    """
    config, params, stats = model
    label = _label(domain, source.domains)
    tokens, length = source.encode(query)
    if length < 2:
        raise UserError(f"there is no word in the query {query!r}")
    block = {
        "pairs": np.stack([tokens, tokens])[None],
        "lengths": np.array([[length, length]]),
        "domain": np.array([label]),
    }
    run = jax.jit(lambda p, s, block: apply(config, p, s, *task.inputs(block))[0])
    asked = _unit(np.asarray(run(params, stats, block), np.float64))[0]
    passages = embed(model, source, task, pairs=len(source)).of(label)
    texts = [pair.b for pair in source.texts if pair.domain == label]
    scores = passages.b @ asked
    return [(float(scores[i]), texts[i]) for i in np.argsort(-scores, kind="stable")[:count]]


def _label(domain: str | None, domains: Sequence[str]) -> int:
    if domain is None and len(domains) == 1:
        return 0
    if domain is not None and domain in domains:
        return list(domains).index(domain)
    if domain is not None and domain.isdecimal() and int(domain) < len(domains):
        return int(domain)
    raise UserError(f"domain {domain!r} that no expert has; valid: {', '.join(domains)}, or 0..{len(domains) - 1}")
