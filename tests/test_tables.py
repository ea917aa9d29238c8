"""What a person reads: every figure under its title, and only what there is to say."""

from typing import Any

import numpy as np

from pipeline.compare import BinFlips, ClassFlips, Comparison, Cosines, Flip, Truth
from pipeline.evaluate import ClassMatch, Evaluation, Options, Result
from pipeline.metrics import Metrics, Tally
from pipeline.pairs import Run
from pipeline.tables import comparison_text, evaluation_text
from pipeline.truth import LabeledSet

NAMES = ("ant", "bee", "cow, cattle")


def metrics(num_failed: int = 0, num_wrong: int = 2) -> Metrics:
    tally = Tally(NAMES)
    truth = np.arange(1500, dtype=np.int32) % 3
    answer = np.stack([truth, (truth + 1) % 3], axis=1).astype(np.int32)
    answer[:num_wrong] = answer[:num_wrong, ::-1]
    tally.add(truth, answer, np.full(1500, 0.95, np.float32))
    tally.add_failures(np.zeros(num_failed, np.int32), ["truncated"] * num_failed)
    return tally.metrics()


def evaluation(**changes: Any) -> Evaluation:
    rules = [("ant", "name"), ("bee", "name"), ("cow", "synonym")]
    values: dict[str, Any] = {
        "model_id": "me/model",
        "model_revision": "abc",
        "weights_digest": "d" * 64,
        "num_labels": 3,
        "data": LabeledSet(root="me/set", split="val", image_column="image", label_column="label"),
        "num_images": 1500,
        "num_ignored": 0,
        "mapping": [
            ClassMatch(name=name, label_id=i, label_name=NAMES[i], rule=rule, num_images=500)  # type: ignore[arg-type]
            for i, (name, rule) in enumerate(rules)
        ],
        "published": None,
        "results": [Result(preprocess="checkpoint", precision="fp32", metrics=metrics())],
        "options": Options(model="me/model", dataset="me/set"),
        "device": "cpu",
        "specs": {},
        "versions": {},
        "seconds": 1.0,
    }
    return Evaluation(**(values | changes))


def test_an_evaluation_is_a_line_per_combination_beside_the_published_figures() -> None:
    results = [
        Result(preprocess=preprocess, precision=precision, metrics=metrics(num_failed, 2))
        for preprocess, precision, num_failed in (("checkpoint", "fp32", 0), ("paper", "bf16", 1000))
    ]
    assert evaluation_text(evaluation(results=results, published=(0.722, 0.911))) == (
        """\
model    me/model (abc), 3 labels
pictures 1,500 of me/set, split val
classes  2 by name
         1 by the first synonym
         cow -> cow, cattle

preprocess  precision  top-1 %  95 % interval  top-5 %  of decoded %  failed     ECE
checkpoint  fp32         99.87  99.52 - 99.96   100.00         99.87       0  0.0487
paper       bf16         59.92  57.99 - 61.82    60.00         99.87   1,000  0.0487
published                 72.2                    91.1

published: on the validation set of ImageNet-1k, preprocessed as in `paper`

least accurate, checkpoint fp32  pictures  top-1 %  top-5 %
ant                                   500    99.80   100.00
bee                                   500    99.80   100.00

most confused, checkpoint fp32  pictures  taken for
ant                                    1  bee
bee                                    1  cow, cattle"""
    )


def test_an_evaluation_without_a_mistake_says_no_more_than_that() -> None:
    result = Result(preprocess="checkpoint", precision="fp32", metrics=metrics(num_wrong=0))
    text = evaluation_text(evaluation(results=[result]))
    assert text.endswith("100.00        100.00       0  0.0500")
    assert "confused" not in text


def test_what_does_not_count_and_what_counts_as_wrong_is_said() -> None:
    result = Result(preprocess="checkpoint", precision="fp32", metrics=metrics(num_failed=3))
    folder = LabeledSet(root="file:///in", names=NAMES, num_images=1503, num_outside=4)
    mapping = [ClassMatch(name="yak", label_id=None, label_name=None, rule="file", num_images=0)]
    mapping += [
        ClassMatch(name=f"n{number}", label_id=0, label_name="ant", rule="position", num_images=9)
        for number in range(12)
    ]
    text = evaluation_text(evaluation(results=[result], data=folder, num_ignored=1234, mapping=mapping))
    for line in (
        "         1,234 more have no label of the model and do not count",
        "         4 files are in no class folder and were not read",
        "         yak -> left out",
        "         n0 -> ant",
        "         and 3 more, see --json",
        "3 pictures have no answer and count as wrong: 3 truncated",
    ):
        assert f"\n{line}\n" in text
    assert "n9" not in text


def test_a_comparison_says_how_far_runs_agree_and_where_they_do_not() -> None:
    runs = [
        Run(where=f"s3://out#space={name}", model_id=name, weights_digest=name, embedding_dim=8) for name in ("x", "y")
    ]
    comparison = Comparison(
        a=runs[0],
        b=runs[1],
        num_both=2000,
        num_only_a=1,
        num_only_b=0,
        top_1_agreement=0.9995,
        top_k=5,
        top_k_agreement=0.5,
        top_k_overlap=0.8,
        best_a_in_b=1.0,
        best_b_in_a=0.9999,
        mean_score_change=-0.0123,
        classes=[ClassFlips("ant", 1000, 1), ClassFlips("bee", 1000, 0)],
        bins=[BinFlips(0.0, 0.1, 0, 0), BinFlips(0.9, 1.0, 2000, 1)],
        flips=[Flip("ant", "cow, cattle", 1)],
        cosines=Cosines(mean=0.99, first_percentile=0.9, least=-0.5, least_uri="s3://in/a.jpg"),
        truth=Truth(top_1_a=0.5, top_1_b=0.25, num_only_a_right=1200, num_only_b_right=3),
    )
    assert comparison_text(comparison) == (
        """\
A                           x, s3://out#space=x
B                           y, s3://out#space=y
labeled by both             2,000 pictures
only by A, only by B        1, 0
same best label             99.95 %
same 5 labels               50.00 %
labels in common of 5       80.00 %
A's best within B's 5       100.00 %
B's best within A's 5       99.99 %
score of the best, B - A    -0.0123 on average
top-1 of A, of B            50.00 %, 25.00 %
only A right, only B right  1,200, 3
cosine of the vectors       mean 0.990000, 1st percentile 0.900000, least -0.500000
least alike                 s3://in/a.jpg
                            of two models: they say little, since each has directions of its own

score in A  pictures  other in B     %
0.9 - 1.0      2,000           1  0.05

label in A  pictures  other in B     %
ant            1,000           1  0.10

most frequent changes  pictures  becomes
ant                           1  cow, cattle"""
    )
