"""effv2: experiment tracking on MLflow around EfficientNetV2."""

__version__ = "0.1.0"
