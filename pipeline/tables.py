"""Evaluations and comparisons -> text for a terminal.

A module of its own because what is measured should not be mixed with how many columns a terminal has; everything that
is left out here is in the JSON.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline.columns import aligned
from pipeline.compare import Comparison
from pipeline.evaluate import Evaluation, Result
from pipeline.label_map import RULES, Rule

MAX_LINES = 10
"""Of each list that may be long."""


def evaluation_text(evaluation: Evaluation) -> str:
    """What was evaluated, a line per preprocessing and precision, and where the first of them errs."""
    first = evaluation.results[0]
    sections = [
        "\n".join(_about(evaluation)),
        aligned(_accuracies(evaluation)),
        "\n".join([*_published(evaluation), *_failures(first)]),
        aligned(_weakest(first)),
        aligned(_confused(first)),
    ]
    return "\n\n".join(section for section in sections if section)


def _about(evaluation: Evaluation) -> Iterator[str]:
    yield f"model    {evaluation.model_id} ({evaluation.model_revision}), {evaluation.num_labels:,} labels"
    part = f", split {evaluation.data.split}" if evaluation.data.split else ""
    yield f"pictures {evaluation.num_images:,} of {evaluation.data}{part}"
    if evaluation.num_ignored:
        yield f"         {evaluation.num_ignored:,} more have no label of the model and do not count"
    if evaluation.data.num_outside:
        yield f"         {evaluation.data.num_outside:,} files are in no class folder and were not read"
    rules: Counter[Rule] = Counter(each.rule for each in evaluation.mapping if each.rule is not None)
    for number, (rule, how_many) in enumerate(rules.most_common()):
        yield f"{'classes ' if not number else '        '} {how_many:,} {RULES[rule]}"
    told = [each for each in evaluation.mapping if each.rule is not None and each.name != each.label_name]
    for match in told[:MAX_LINES]:
        yield f"         {match.name} -> {'left out' if match.label_name is None else match.label_name}"
    if len(told) > MAX_LINES:
        yield f"         and {len(told) - MAX_LINES:,} more, see --json"


def _accuracies(evaluation: Evaluation) -> Iterator[Sequence[str]]:
    yield ("preprocess", "precision", "top-1 %", "95 % interval", "top-5 %", "of decoded %", "failed", "ECE")
    for result in evaluation.results:
        metrics = result.metrics
        yield (
            result.preprocess,
            result.precision,
            _per_cent(metrics.top_1),
            " - ".join(map(_per_cent, metrics.top_1_interval)),
            _per_cent(metrics.top_5),
            _per_cent(metrics.top_1_of_decoded),
            f"{metrics.num_failed:,}",
            "" if metrics.calibration_error is None else f"{metrics.calibration_error:.4f}",
        )
    if evaluation.published is not None:
        top_1, top_5 = evaluation.published
        yield ("published", "", f"{100 * top_1:.1f}", "", f"{100 * top_5:.1f}")


def _published(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.published is not None:
        yield "published: on the validation set of ImageNet-1k, preprocessed as in `paper`"


def _failures(result: Result) -> Iterator[str]:
    if result.metrics.num_failed:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in result.metrics.failures.items())
        yield f"{result.metrics.num_failed:,} pictures have no answer and count as wrong: {kinds}"


def _weakest(result: Result) -> Iterator[Sequence[str]]:
    wrong = (each for each in result.metrics.classes if each.top_1 < 1)
    classes = sorted(wrong, key=lambda each: (each.top_1, each.top_5, each.label_id))
    if classes:
        yield (f"least accurate, {result.preprocess} {result.precision}", "pictures", "top-1 %", "top-5 %")
    for each in classes[:MAX_LINES]:
        yield (each.name, f"{each.num_images:,}", _per_cent(each.top_1), _per_cent(each.top_5))


def _confused(result: Result) -> Iterator[Sequence[str]]:
    if result.metrics.confusions:
        yield (f"most confused, {result.preprocess} {result.precision}", "pictures", "taken for")
    for each in result.metrics.confusions[:MAX_LINES]:
        yield (each.name, f"{each.num_images:,}", each.taken_for)


def comparison_text(comparison: Comparison) -> str:
    """Both runs, how far they agree, and where they do not."""
    k = comparison.top_k
    lines = [
        ("A", f"{comparison.a.model_id}, {comparison.a.where}"),
        ("B", f"{comparison.b.model_id}, {comparison.b.where}"),
        ("labeled by both", f"{comparison.num_both:,} pictures"),
        ("only by A, only by B", f"{comparison.num_only_a:,}, {comparison.num_only_b:,}"),
        ("same best label", f"{_per_cent(comparison.top_1_agreement)} %"),
        (f"same {k} labels", f"{_per_cent(comparison.top_k_agreement)} %"),
        (f"labels in common of {k}", f"{_per_cent(comparison.top_k_overlap)} %"),
        (f"A's best within B's {k}", f"{_per_cent(comparison.best_a_in_b)} %"),
        (f"B's best within A's {k}", f"{_per_cent(comparison.best_b_in_a)} %"),
        ("score of the best, B - A", f"{comparison.mean_score_change:+.4f} on average"),
        *_truth(comparison),
        *_cosines(comparison),
    ]
    sections = [lines, list(_by_score(comparison)), list(_by_class(comparison)), list(_flips(comparison))]
    return "\n\n".join(aligned(section) for section in sections if section)


def _truth(comparison: Comparison) -> Iterator[Sequence[str]]:
    if (truth := comparison.truth) is not None:
        yield ("top-1 of A, of B", f"{_per_cent(truth.top_1_a)} %, {_per_cent(truth.top_1_b)} %")
        yield ("only A right, only B right", f"{truth.num_only_a_right:,}, {truth.num_only_b_right:,}")


def _cosines(comparison: Comparison) -> Iterator[Sequence[str]]:
    if (cosines := comparison.cosines) is None:
        return
    text = f"mean {cosines.mean:.6f}, 1st percentile {cosines.first_percentile:.6f}, least {cosines.least:.6f}"
    yield ("cosine of the vectors", text)
    yield ("least alike", cosines.least_uri)
    if comparison.a.weights_digest != comparison.b.weights_digest:
        yield ("", "of two models: they say little, since each has directions of its own")


def _by_score(comparison: Comparison) -> Iterator[Sequence[str]]:
    yield ("score in A", "pictures", "other in B", "%")
    for each in comparison.bins:
        if each.num_images:
            share = each.num_flipped / each.num_images
            yield (
                f"{each.above:.1f} - {each.up_to:.1f}",
                f"{each.num_images:,}",
                f"{each.num_flipped:,}",
                _per_cent(share),
            )


def _by_class(comparison: Comparison) -> Iterator[Sequence[str]]:
    changed = [each for each in comparison.classes if each.num_flipped][:MAX_LINES]
    if changed:
        yield ("label in A", "pictures", "other in B", "%")
    for each in changed:
        share = each.num_flipped / each.num_images
        yield (each.name, f"{each.num_images:,}", f"{each.num_flipped:,}", _per_cent(share))


def _flips(comparison: Comparison) -> Iterator[Sequence[str]]:
    if comparison.flips:
        yield ("most frequent changes", "pictures", "becomes")
    for each in comparison.flips[:MAX_LINES]:
        yield (each.name, f"{each.num_images:,}", each.becomes)


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
