"""The logged and served model: image in, class names and probabilities out."""
