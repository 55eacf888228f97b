"""Detection metrics against loops, Rel-U against a numerical optimiser, coverage against simulated truths."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.predictive.coverage import credible_sets, uncertainty_metrics
from pyro_isingvit.predictive.detection import SCORES, detection_metrics, ood_metrics, uncertainty_scores
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.predictive.rel_u import fit_relative_uncertainty, misclassification_metrics


def made(samples: int = 30, count: int = 150, classes: int = 4, spread: float = 0.5):
    """Draws around common logits, and labels from one further draw: a posterior that is right."""
    common = torch.randn(count, classes) * 2
    logits = common + spread * torch.randn(samples + 1, count, classes)
    probs = logits.softmax(-1)
    return PredictiveDraws(probs[:-1]), torch.multinomial(probs[-1], 1)[:, 0]


# -- detection -------------------------------------------------------------------------------------------------


def test_detection_by_loops() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(80) < 0.4
    scores = np.round(rng.normal(size=80) + positive, 1)  # with ties
    found = detection_metrics(scores, positive)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert found["auroc"] == pytest.approx(np.mean(pairs))
    flagged = [(scores[~positive] >= t).mean() for t in np.unique(scores) if (scores[positive] >= t).mean() >= 0.95]
    assert found["fpr95"] == pytest.approx(min(flagged))
    aupr, recall = 0.0, 0.0
    for t in np.unique(scores)[::-1]:
        chosen = scores >= t
        here = (chosen & positive).sum() / positive.sum()
        aupr, recall = aupr + (here - recall) * positive[chosen].mean(), here
    assert found["aupr"] == pytest.approx(aupr)


def test_ood_metrics_at_the_ends() -> None:
    low, high = np.linspace(0, 1, 20), np.linspace(2, 3, 30)
    assert ood_metrics(low, high) == pytest.approx({"auroc": 1.0, "fpr95": 0.0, "aupr": 1.0})
    assert ood_metrics(high, low)["auroc"] == 0.0 and ood_metrics(high, low)["fpr95"] == 1.0
    same = ood_metrics(np.ones(20), np.ones(60))
    assert same["auroc"] == 0.5 and same["fpr95"] == 1.0 and same["aupr"] == pytest.approx(0.75)


def test_fpr95_positives_are_the_strange_images() -> None:
    """19 of 20 strange images lie above every training-like one; the last lies below all: 95 % cost nothing."""
    assert ood_metrics(np.full(10, 0.5), np.array([0.0, *[1.0] * 19]))["fpr95"] == 0.0
    assert ood_metrics(np.array([0.5] * 9 + [2.0]), np.ones(20))["fpr95"] == pytest.approx(0.1)
    assert ood_metrics(np.arange(100.0), np.arange(100.0))["fpr95"] == pytest.approx(0.95)  # a straight ROC curve


@pytest.mark.parametrize("scores", [[], [float("nan")], [float("inf")]])
def test_bad_scores_are_refused(scores) -> None:
    with pytest.raises(UserError):
        ood_metrics(np.array(scores), np.ones(3))


def test_counts_must_agree() -> None:
    with pytest.raises(UserError):
        detection_metrics(np.ones(3), np.ones(4, dtype=bool))


# -- uncertainty -----------------------------------------------------------------------------------------------


def test_uncertainty_by_definition() -> None:
    draws, labels = made()
    found = uncertainty_metrics(draws, labels)
    wrong = draws.mean.argmax(-1) != labels
    assert found["entropy_mean"] == pytest.approx(float(draws.entropy.mean()), rel=1e-5)
    assert found["mutual_information_wrong"] == pytest.approx(float(draws.mutual_information[wrong].mean()), rel=1e-5)
    assert found["entropy_right"] == pytest.approx(float(draws.entropy[~wrong].mean()), rel=1e-5)
    for name, values in uncertainty_scores(draws).items():
        expected = detection_metrics(values, wrong.numpy())
        assert found[f"auroc_wrong_{name}"] == expected["auroc"] and found[f"fpr95_wrong_{name}"] == expected["fpr95"]
    plain = classification_metrics(draws.mean, labels)
    assert found["auroc_wrong_max_probability"] == pytest.approx(plain["auroc_right_wrong"], abs=1e-3)
    assert set(uncertainty_scores(draws)) == set(SCORES)


def test_everything_is_finite_and_json() -> None:
    draws, labels = made()
    right = draws.mean.argmax(-1)
    for truth in (labels, right, (right + 1) % 4):
        found = {**uncertainty_metrics(draws, truth), **misclassification_metrics(draws, truth, draws, truth)}
        json.dumps(found, allow_nan=False)
        assert all(value is None or isinstance(value, float | int) for value in found.values())
    found = uncertainty_metrics(draws, right)
    assert found["entropy_wrong"] is None and found["auroc_wrong_entropy"] is None
    assert found["entropy_right"] == found["entropy_mean"]


def test_one_draw_and_one_image_will_do() -> None:
    found = uncertainty_metrics(PredictiveDraws(torch.tensor([[[0.8, 0.2]]])), torch.tensor([0]))
    assert found["mutual_information_mean"] == 0.0 and found["credible_set_coverage"] == 1.0


def test_credible_sets_by_hand() -> None:
    mean = np.array([[0.5, 0.4, 0.1], [0.95, 0.03, 0.02], [0.34, 0.33, 0.33], [0.05, 0.9, 0.05]])
    assert credible_sets(mean).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]]
    draws, labels = PredictiveDraws(torch.from_numpy(mean)[None]), torch.tensor([2, 0, 2, 0])
    found = uncertainty_metrics(draws, labels)
    assert found["credible_set_coverage"] == 0.5 and found["credible_set_size"] == 7 / 4
    assert found["credible_set_mass"] == pytest.approx((0.9 + 0.95 + 1 + 0.9) / 4)


def test_coverage_of_a_posterior_that_is_right() -> None:
    """Labels come from a further draw, so both coverages must hold; the interval of the weights alone falls short."""
    found = [uncertainty_metrics(*made(samples=40)) for _ in range(20)]
    mean = {name: np.mean([one[name] for one in found]) for name in found[0]}
    assert mean["credible_set_coverage"] == pytest.approx(mean["credible_set_mass"], abs=0.02)
    assert 0.88 <= mean["predictive_interval_coverage"] <= 1.0
    assert mean["interval_coverage"] < 0.6


def test_coverage_falls_when_the_draws_are_sure_and_wrong() -> None:
    draws, labels = made(count=400)
    sure = PredictiveDraws((draws.probs.log() * 4).softmax(-1))
    assert uncertainty_metrics(sure, labels)["predictive_interval_coverage"] < 0.5
    held, honest = (uncertainty_metrics(each, labels) for each in (sure, draws))
    assert held["credible_set_mass"] - held["credible_set_coverage"] > 0.1
    assert abs(honest["credible_set_mass"] - honest["credible_set_coverage"]) < 0.06


@pytest.mark.parametrize("labels", [[0], [], [0] * 149 + [9], [0] * 149 + [-1]])
def test_labels_that_do_not_fit_are_refused(labels) -> None:
    draws, _ = made()
    with pytest.raises(UserError):
        uncertainty_metrics(draws, torch.tensor(labels, dtype=torch.long))
    with pytest.raises(UserError):
        misclassification_metrics(draws, torch.tensor(labels, dtype=torch.long), None, None)


# -- Rel-U -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.7, 2.0)])
def test_closed_form_is_the_constrained_minimum(weight: float, temperature: float) -> None:
    """SLSQP over the six distances of four classes: not negative, norm at most 1."""
    draws, labels = made(count=60)
    probs = draws.mean
    fitted = fit_relative_uncertainty(probs, labels, weight, temperature)
    wrong = probs.argmax(-1) != labels
    p = (probs.double().log() / temperature).softmax(-1).numpy()
    rows, columns = np.triu_indices(4, 1)

    def objective(values: np.ndarray) -> float:
        matrix = np.zeros((4, 4))
        matrix[rows, columns] = matrix[columns, rows] = values
        each = np.einsum("bi,ij,bj->b", p, matrix, p)
        return (1 - weight) * each[~wrong].mean() - weight * each[wrong].mean()

    norm = {"type": "ineq", "fun": lambda values: 1 - 2 * (values**2).sum()}
    best = minimize(objective, np.full(6, 0.1), method="SLSQP", bounds=[(0, None)] * 6, constraints=[norm],
                    options={"ftol": 1e-15, "maxiter": 500})  # fmt: skip
    assert best.success
    assert objective(fitted.distances.numpy()[rows, columns]) <= best.fun + 1e-9
    assert fitted.distances.numpy()[rows, columns] == pytest.approx(best.x, abs=1e-4)
    assert int((fitted.distances > 0).sum()) > 0


def test_the_matrix_is_what_the_paper_asks_for() -> None:
    draws, labels = made()
    matrix = fit_relative_uncertainty(draws.mean, labels).distances
    assert torch.equal(matrix, matrix.T) and float(matrix.min()) >= 0 and float(matrix.diagonal().abs().max()) == 0
    assert float(matrix.norm()) == pytest.approx(1.0)


def test_order_of_images_and_names_of_classes_do_not_matter() -> None:
    draws, labels = made()
    probs, images, classes = draws.mean, torch.randperm(150), torch.randperm(4)
    scores = fit_relative_uncertainty(probs, labels).score(probs)
    shuffled = fit_relative_uncertainty(probs[images], labels[images]).score(probs)
    renamed = fit_relative_uncertainty(probs[:, classes], classes.argsort()[labels]).score(probs[:, classes])
    torch.testing.assert_close(scores, shuffled)
    torch.testing.assert_close(scores, renamed)


def test_the_learned_pair_scores_higher() -> None:
    """Classes 0 and 1 are confused, 2 and 3 are not, at the same entropies."""
    one, other = [0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.6, 0.4]
    probs = torch.tensor([one] * 10 + [other] * 10)
    detector = fit_relative_uncertainty(probs, torch.tensor([1] * 5 + [0] * 5 + [2] * 10))
    first, second = detector.score(torch.tensor([one, other])).tolist()
    assert first > second and detector.wrong == 5


def test_without_wrong_images_it_is_the_gini_impurity() -> None:
    draws, _ = made()
    for labels in (draws.mean.argmax(-1), torch.empty(0, dtype=torch.long)):
        detector = fit_relative_uncertainty(draws.mean[: len(labels)], labels)
        gini = 1 - (draws.mean.double() ** 2).sum(-1)
        torch.testing.assert_close(detector.score(draws.mean) * 12**0.5, gini, rtol=1e-5, atol=1e-6)  # 4 x 3 ones
        assert detector.wrong == 0


def test_misclassification_needs_a_validation_part() -> None:
    draws, labels = made()
    nothing = torch.empty(0, dtype=torch.long)
    for pair in ((None, None), (None, nothing)):
        assert set(misclassification_metrics(draws, labels, *pair).values()) == {None}
    found = misclassification_metrics(draws, labels, draws, labels)
    assert found["auroc_wrong_rel_u"] > 0.5
    assert found["rel_u_val_wrong"] == int((draws.mean.argmax(-1) != labels).sum())


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 0.0)])
def test_bad_settings_are_refused(weight: float, temperature: float) -> None:
    draws, labels = made()
    with pytest.raises(UserError):
        fit_relative_uncertainty(draws.mean, labels, weight, temperature)
