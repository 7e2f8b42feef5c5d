"""What a run shows of its predictions: the surest mistakes, the most confused classes, the calibration."""

from __future__ import annotations

import csv
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from effv2.core.calibration import calibration_error
from effv2.data.dataset import load_dataset
from effv2.data.inspection import COLUMNS, GAP, TILE
from effv2.run.records import MOST_NAMED, MOST_WRONG, _confusion_figure, log_test
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training
from tests.conftest import tiny_config


def test_a_run_shows_its_surest_mistakes_and_how_sure_it_may_be(sqlite_store: str, tmp_path: Path) -> None:
    client, config = MlflowClient(), tiny_config()
    dataset = load_dataset(config.data)
    run = TrackedRun(client.create_run("0").info.run_id, "0")
    metrics = log_test(run, Training(config, dataset))
    folder = Path(client.download_artifacts(run.run_id, "", str(tmp_path)))
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sure, right = np.array([(float(row["probability"]), row["true"] == row["predicted"]) for row in rows]).T
    assert metrics["selected/test_accuracy"] == pytest.approx(right.mean())
    assert metrics["selected/test_ece"] == pytest.approx(calibration_error(sure, right), abs=1e-5)
    assert (folder / "reliability.png").is_file()
    sheet = np.asarray(Image.open(folder / "wrong.jpg"), float)
    assert sheet.shape[1] == COLUMNS * (TILE + 4 * GAP) and (right == 0).sum() > MOST_WRONG
    wrong = [place for place in np.argsort(-sure, kind="stable") if not right[place]]
    labels = dataset.test.labels.tolist()
    assert {labels[place] for place in wrong} == set(range(10))
    surest = [[place for place in wrong if labels[place] == label][: MOST_WRONG // 10] for label in range(10)]
    pixels = dataset.test.pixels[dataset.test.rows[list(chain(*surest))]].numpy().astype(float)
    shown = [sheet[GAP : GAP + TILE, GAP + left : GAP + left + TILE] for left in (0, TILE + 4 * GAP)]
    for tile, image in zip(shown, pixels, strict=False):  # in this order; JPEG keeps the middle of a pixel
        middle = tile[8::16, 8::16]
        assert abs(middle - image).mean() < min(abs(middle - each).mean() for each in pixels if (each != image).any())


def test_with_many_classes_only_the_most_confused_pairs_are_named() -> None:
    classes = [f"class {number}" for number in range(100)]
    matrix = 40 * np.eye(100, dtype=int)
    for number in range(MOST_NAMED + 5):
        matrix[number, number + 1] = number
    matrix, columns = np.hstack([matrix, np.full((100, 1), 0)]), [*classes, "other"]
    matrix[7, 100] = 50
    main, beside = _confusion_figure(matrix, columns).axes
    named = [label.get_text() for label in beside.get_yticklabels()]
    assert named[:2] == ["class 7 (7) as other (100)", "class 34 (34) as class 35 (35)"] and len(named) == MOST_NAMED
    assert [text.get_text() for text in beside.texts][:2] == ["50 of 97", "34 of 74"] and not main.texts
    (alone,) = _confusion_figure(matrix[:9, :9], columns[:9]).axes
    assert len(alone.texts) == 81
