"""MLflow: opening, writing and reading runs. The only room that imports mlflow."""
