"""MLflow: the life of a run, what it holds, and reading it back. The one room that imports mlflow."""
