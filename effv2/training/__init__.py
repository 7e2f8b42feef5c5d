"""The training loop, evaluation, schedules and stopping. Knows nothing of MLflow."""
