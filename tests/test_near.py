"""ort_train.near: what an unknown name was probably meant to be."""

from __future__ import annotations

from ort_train.near import did_you_mean, near_matches


def test_two_at_most_are_offered_the_nearest_first():
    options = ["padding", "label_sparsity", "padding_sparsity", "token_sparsity"]
    assert did_you_mean("pading_sparsity", options) == (
        "did you mean padding_sparsity or token_sparsity?"
    )
    assert did_you_mean("pading_sparsity", options, cutoff=0.9) == "did you mean padding_sparsity?"
    assert near_matches("pading", options) == "did you mean padding?"


def test_without_any_near():
    assert did_you_mean("zzz", ["a", "b"]) == ""
    assert near_matches("zzz", ["a", "b"]) == "there are a, b"
    assert near_matches("zzz", []) == "there are none"
