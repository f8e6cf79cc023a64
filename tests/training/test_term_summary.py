"""What is said of a training run whose terms act, and of one whose terms do not."""

from __future__ import annotations

from clincot.training.term_summary import summarize_terms

STEP = {
    "margin_logits": 0.4,
    "margin_logits_max": 0.9,
    "reward_margin": 0.5,
    "reward_margin_std": 0.2,
}
PROBE = STEP | {"preference_share": 0.6, "margin_share": 0.2}


def test_terms_that_act_get_no_warning() -> None:
    summary = summarize_terms([PROBE, STEP])
    assert summary.list_warnings() == []
    assert summary.describe() == (
        "The preferences are 60% of the gradient, and the margin turns them by a share of 0.2000; β·Δ reached 0.500 "
        "logits, of a mean margin of 0.400."
    )


def test_a_weak_preference_names_the_anchor_and_beta() -> None:
    """The mean over the probes decides: (0.05 + 0.13) / 2 = 0.09, below a tenth."""
    log = [PROBE | {"preference_share": 0.05}, STEP, PROBE | {"preference_share": 0.13}]
    (warning,) = summarize_terms(log).list_warnings()
    assert warning == (
        "The preferences are 9% of the gradient, so that this is practically supervised training on the chosen "
        "answers; lower train.nll_weight or raise train.beta."
    )


def test_a_margin_below_the_spread_of_the_pairs_names_lambda() -> None:
    (warning,) = summarize_terms([PROBE | {"margin_logits_max": 0.2}]).list_warnings()
    assert "largest margin (0.200 logits) does not exceed the spread" in warning
    assert "raise train.margin_lambda" in warning


def test_a_margin_that_only_scales_the_step_is_plain_dpo() -> None:
    """As in a round with cos(margin-DPO, DPO) = .9999: the sine is .014."""
    (warning,) = summarize_terms([PROBE | {"margin_share": 0.014, "reward_margin": 0.048}]).list_warnings()
    assert "practically plain DPO: β·Δ reached 0.048 of a mean margin of 0.400 logits" in warning


def test_no_margin_is_no_reason_to_warn_of_it() -> None:
    """Plain DPO: margin_lambda is 0."""
    assert summarize_terms([PROBE | {"margin_logits_max": 0.0, "margin_share": 0.0}]).list_warnings() == []


def test_what_was_reached_is_read_from_the_last_tenth() -> None:
    """Twenty steps: the last two, 0.3 and 0.5."""
    log = [STEP | {"reward_margin": 0.0}] * 18 + [STEP | {"reward_margin": 0.3}, STEP | {"reward_margin": 0.5}]
    assert summarize_terms(log).beta_delta == 0.4
    assert "were not measured" in summarize_terms(log).describe()


def test_a_log_of_supervised_training_says_nothing() -> None:
    summary = summarize_terms([{"loss": 1.0}])
    assert summary.describe() == ""
    assert summary.list_warnings() == []
    assert summarize_terms([]).describe() == ""
