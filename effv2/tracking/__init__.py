"""MLflow: opening, writing and reading runs. The only package that imports mlflow."""
