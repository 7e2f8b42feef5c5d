"""Whether a network's confidence agrees with its accuracy: expected calibration error, and its diagram."""

import numpy as np
from matplotlib.figure import Figure

from effv2.core.figures import PALETTE

CALIBRATION_BINS = 15


def _binned(confidence: np.ndarray, right: np.ndarray, bins: int) -> list[np.ndarray]:
    """Return the number of images and the sums of confidences and hits in each of `bins` intervals (low, high]."""
    edges = np.linspace(0, 1, bins + 1)
    members = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    return [np.bincount(members, weights=each, minlength=bins) for each in (None, confidence, right)]


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error (Guo et al. 2017) of confidences (N) in [0, 1] and correct answers (N).

    It is the mean gap between confidence and accuracy of the bins, weighted by their numbers of images.
    """
    _, sure, hits = _binned(confidence, right, bins)
    return float(np.abs(sure - hits).sum() / len(confidence))


def reliability_diagram(confidence: np.ndarray, right: np.ndarray) -> Figure:
    """Draw accuracy over confidence by bin, and below it the number of images per bin."""
    (images, sure, hits), width = _binned(confidence, right, CALIBRATION_BINS), 1 / CALIBRATION_BINS
    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled, centres = images > 0, (np.arange(CALIBRATION_BINS) + 0.5) * width
    accuracy = hits[filled] / images[filled]
    above.bar(centres[filled], accuracy, 0.92 * width, color=PALETTE[0], label="accuracy")
    above.plot(
        sure[filled] / images[filled], accuracy, "o", color=PALETTE[1], markersize=4, label="at the mean confidence"
    )
    above.plot([0, 1], [0, 1], "--", color="#555555", linewidth=1, label="perfectly calibrated")
    title = f"expected calibration error {100 * calibration_error(confidence, right):.2f} points"
    above.set(title=title, ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
    above.legend(loc="upper left", fontsize="small")
    below.bar(centres, images, 0.92 * width, color="#888888")
    below.set(xlabel="confidence of the predicted class", ylabel="images")
    return figure
