"""The model as it is logged and served: image in, class names and probabilities out."""
