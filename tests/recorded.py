"""What finished runs rest on, recorded: the code that decides results, definition by definition, and a few numbers.

    python -m tests.recorded

records both again. That confirms that changed code gives equal results: where they differ it refuses, until the commit
raises the number of what changed in effv2.provenance.VERSIONS. Additions don't count, nor do comments, docstrings,
annotations, the words of errors and the names of local variables.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effv2.config import AugmentConfig, DataConfig, TrainConfig
from effv2.data.augment import augment_images
from effv2.data.batches import epoch_order
from effv2.data.dataset import load_dataset
from effv2.data.preparation import CentreCrop, Square
from effv2.execution.device import make_execution
from effv2.provenance import VERSIONS
from effv2.training.loop import Training
from effv2.training.state import TrainState

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_suffix(".json")
# The modules behind each version. Of architecture the network alone: its tables are part of a run's configuration.
DECIDING: dict[str, dict[str, tuple[str, ...]]] = {
    "decoding": {"data/images.py": (), "data/preparation.py": ()},
    "network": {"architecture.py": ("build_model", "_block_config", "Stage", "Table")},
    "batches": {"data/augment.py": (), "data/batches.py": (), "data/transfer.py": ()},
    "training": {
        "randomness.py": (),
        **{f"training/{name}.py": () for name in ("evaluate", "loop", "schedules", "state")},
    },
    "execution": {
        f"execution/{name}.py": () for name in ("compilation", "device", "fast_paths", "folding", "recording")
    },
    "evaluation": {
        "pretrained/images.py": (),
        "pretrained/measure.py": (),
        "evidence/statistics.py": ("calibration_error",),
    },
}
Code = dict[str, dict[str, str]]  # version: "file definition": digest
TOLERANCE = 1e-3  # of losses: processors and releases of torch round differently, and steps enlarge it


def code(root: Path = ROOT / "effv2") -> Code:
    """Return a digest of each definition behind each version."""
    found: Code = {}
    for version, files in DECIDING.items():
        for file, wanted in files.items():
            for name, digest in definitions((root / file).read_text()).items():
                if not wanted or name.partition(".")[0] in wanted:
                    found.setdefault(version, {})[f"{file} {name}"] = digest
    return found


def changed(before: Code, now: Code) -> dict[str, list[str]]:
    """Return the recorded definitions that are gone or differ, by version; what was added doesn't count."""
    differing = {
        version: [name for name, digest in names.items() if now.get(version, {}).get(name) != digest]
        for version, names in before.items()
    }
    return {version: names for version, names in differing.items() if names}


def definitions(source: str) -> dict[str, str]:
    """Return a digest of each function, method, class attribute, module constant and entry of a module's tables."""
    return {
        name: hashlib.sha256(ast.dump(_Canonical().visit(node)).encode()).hexdigest()[:12]
        for name, node in _named(ast.parse(source).body, "")
    }


def _named(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            heading = ast.ClassDef(node.name, node.bases, node.keywords, [ast.Pass()], node.decorator_list)
            yield f"{owner}{node.name}", heading
            yield from _named(node.body, f"{owner}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{owner}{node.name}", node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
            name = f"{owner}{ast.unparse(target)}"
            if isinstance(node.value, ast.Dict) and not owner:
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    yield f"{name}[{ast.unparse(key) if key else '**'}]", value
            else:
                yield name, node.value or ast.Pass()


class _Canonical(ast.NodeTransformer):
    """Leaves what decides a result: no docstring, annotation, or words of an error; local names by their order."""

    def __init__(self) -> None:
        self._locals: dict[str, str] = {}
        self._inside = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outermost, self._inside = not self._inside, True
        if outermost:
            self._locals = {name: f"local {number}" for number, name in enumerate(_local_names(node))}
        node.returns = None
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.name = self._locals.get(node.name, node.name)
        self.generic_visit(node)
        if outermost:
            self._inside = False
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._locals.get(node.arg, node.arg))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._locals.get(node.id, node.id), node.ctx)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.generic_visit(ast.Assign([node.target], node.value or ast.Constant(None)))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()


def _local_names(function: ast.AST) -> list[str]:
    """Return parameters, variables and inner functions in the order of their appearance, globals left out."""
    names: dict[str, None] = {}
    shared: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names[node.arg] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        elif isinstance(node, ast.FunctionDef) and node is not function:
            names[node.name] = None
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            shared.update(node.names)
    return [name for name in names if name not in shared]


def numbers() -> dict[str, Any]:
    """Return what a few small computations give: digests, which are exact anywhere, and losses."""
    return {**_exact(), **_losses()}


def _exact() -> dict[str, str]:
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (16, 3, 12, 12), dtype=np.uint8))
    torch.manual_seed(0)
    augmented = augment_images(images, AugmentConfig(crop=2, flip=True, erasing=0.5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.png")
        Image.fromarray(generator.integers(0, 256, (13, 17, 4), dtype=np.uint8)).save(path)
        prepared = {
            "square": Square(8)(Image.open(path)),
            "centre crop": CentreCrop(8, 10, "bilinear")(Image.open(path)),
        }
    splits = {
        "standard split": DataConfig(image_size=8, per_class=20),
        "published split": DataConfig(image_size=8, per_class=20, sampling="published", validation_fraction=0),
    }
    arrays = {**prepared, "augmented": augmented.numpy(), "order": epoch_order(50, seed=3, epoch=2).numpy()}
    return {name: _digest(array) for name, array in arrays.items()} | {
        name: load_dataset(config).digest() for name, config in splits.items()
    }


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def _losses() -> dict[str, list[float]]:
    """Return the losses of short trainings, each with its own optimiser, schedule and kinds of block."""
    table = "F 1 3 1 8 8 1 / F 2 3 2 8 16 1 / M 4 3 2 16 24 2"
    shared = {"data": {"image_size": 16, "per_class": 12}, "execution": {"device": "cpu", "precision": "fp32"}}
    trainings: Mapping[str, dict[str, Any]] = {
        "adamw, cosine, all augmentation": {
            "augment": {"crop": 2, "flip": True, "erasing": 0.3, "mixup": 0.4, "cutmix": 0.5},
            "optimiser": {"batch_size": 32, "ema_decay": 0.9, "label_smoothing": 0.1},
            "schedule": {"epochs": 2, "warmup_epochs": 1},
        },
        "adam, plateau, wide head": {
            "optimiser": {"name": "adam", "batch_size": 20, "weight_decay": 0, "clip_norm": 0},
            "schedule": {"name": "plateau", "plateau_patience": 0, "epochs": 3},
            "evaluation": {"train_set": True},
            "outputs": 30,
        },
        "sgd, onecycle, zero start": {
            "optimiser": {"name": "sgd", "lr": 0.05, "batch_size": 32},
            "schedule": {"name": "onecycle", "epochs": 2},
            "zero_init_residual": True,
        },
    }
    found = {}
    for name, settings in trainings.items():
        model: dict[str, Any] = {key: settings[key] for key in ("outputs", "zero_init_residual") if key in settings}
        groups = {key: value for key, value in settings.items() if isinstance(value, dict)}
        model |= {"variant": "recorded", "table": table}
        config = TrainConfig.model_validate(shared | groups | {"model": model})
        dataset, execution = load_dataset(config.data), make_execution(config.execution)
        results = Training(config, dataset, TrainState.create(config, dataset, execution), execution)
        found[name] = [round(each.metrics[f"{of}/loss"], 6) for each in results for of in ("train", "test")]
    return found


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the recorded numbers that are no longer what they were, or are missing."""

    def same(old: Any, new: Any) -> bool:
        if isinstance(old, str):
            return bool(old == new)
        return len(old) == len(new) and bool(np.allclose(old, new, rtol=TOLERANCE))

    return [name for name, old in before.items() if name not in now or not same(old, now[name])]


def main() -> None:
    """Record anew, unless results differ without a version that says so."""
    before = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"versions": {}, "code": {}, "numbers": {}}
    now: dict[str, Any] = {"versions": VERSIONS, "code": code(), "numbers": numbers()}
    if before["versions"] == VERSIONS and (found := differing(before["numbers"], now["numbers"])):
        sys.exit(f"Other results than before ({', '.join(found)}): raise what changed in effv2.provenance.VERSIONS.")
    RECORDED.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
