"""The model as it is logged and served: image in, class names and probabilities out."""

from pathlib import Path


def image_classifier_path() -> Path:
    """Return the file that MLflow stores with the model and runs when it is loaded."""
    return Path(__file__).with_name("image_classifier.py")
