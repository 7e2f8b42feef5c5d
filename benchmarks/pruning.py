"""The savings and the cost of pruning: the same searches with and without it.

    python benchmarks/pruning.py

Prints a Markdown table: the best validation accuracy of each search, and its total number of epochs. The network is a
small one on digits at 16 pixels, so that ten searches take minutes. It learns in its first epoch, so pruning begins
there.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import click

STUDY = """
name: pruning
config:
  data: {{image_size: 16}}
  model: {{variant: small, table: F 1 3 1 16 16 1 / F 4 3 2 16 32 2 / M 4 3 2 32 64 2 / M 4 3 2 64 96 2}}
  schedule: {{epochs: {epochs}}}
  random: {{seed: {seed}}}
  execution: {{precision: fp32}}
search:
  trials: {trials}
  prune: {prune}
  min_epochs: 1
  space:
    model.dropout: {{low: 0, high: 0.6}}
    model.stochastic_depth: {{low: 0, high: 0.5}}
    model.depth_multiplier: {{low: 0.1, high: 1}}
    optimiser.lr: {{low: 1e-4, high: 1e-1, log: true}}
"""


@click.command()
@click.option("--seeds", default=5, show_default=True, help="Searches of each kind.")
@click.option("--trials", default=24, show_default=True, help="Trials per search.")
@click.option("--epochs", default=8, show_default=True, help="Most epochs per trial.")
def main(seeds: int, trials: int, epochs: int) -> None:
    """Run the searches one after the other in a temporary folder."""
    print("| seed | best, unpruned | best, pruned | points lost | epochs, unpruned | epochs, pruned | share |")
    print("|---|---|---|---|---|---|---|")
    lost, shares = [], []
    for seed in range(seeds):
        results = []
        for prune in ("false", "true"):
            with tempfile.TemporaryDirectory() as folder:
                text = STUDY.format(seed=seed, trials=trials, epochs=epochs, prune=prune)
                results.append(search(Path(folder), text))
        (best, all_epochs), (pruned_best, pruned_epochs) = results
        lost.append(100 * (best - pruned_best))
        shares.append(pruned_epochs / all_epochs)
        figures = f"{best:.2%} | {pruned_best:.2%} | {lost[-1]:.2f} | {all_epochs} | {pruned_epochs} | {shares[-1]:.2f}"
        print(f"| {seed} | {figures} |", flush=True)
    print(f"| median | | | {statistics.median(lost):.2f} | | | {statistics.median(shares):.2f} |")


def search(folder: Path, text: str) -> tuple[float, int]:
    """Run a search in `folder`; return its best validation accuracy and the epochs of all its trials."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    from effv2.api.console import ConsoleReporter
    from effv2.config.options import StudyOptions
    from effv2.config.studies import read_study
    from effv2.core.internals import study_id
    from effv2.core.reporter import Reporter
    from effv2.data.dataset import load_once
    from effv2.studies.engine import run_study
    from effv2.studies.plan import make_search
    from effv2.studies.storage import open_storage
    from effv2.tracking.store import open_store

    path = folder / "study.yaml"
    path.write_text(text)
    storage = f"sqlite:///{folder / 'optuna.db'}"
    os.chdir(folder)  # MLflow's artifacts go below the working directory
    load = load_once(Reporter())
    options = StudyOptions(storage=storage, log_model="none")
    with ConsoleReporter() as reporter:
        plan = make_search(read_study(path), {}, 0, load, reporter)
        run_study(plan, open_store(""), options, load, reporter)
    optuna = open_storage(storage).optuna
    (study,) = optuna.get_all_studies()
    trials = optuna.get_all_trials(study_id(study))
    epochs = sum(max(trial.intermediate_values, default=0) for trial in trials)
    return max(trial.value or 0.0 for trial in trials if trial.state.name == "COMPLETE"), epochs


if __name__ == "__main__":
    main()
