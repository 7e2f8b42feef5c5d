"""The record of what decides results: digests of the code, definition by definition, and a few numbers.

    python -m tests.recorded

records both again. If the code behind a version in effv2.core.provenance.VERSIONS changed, its numbers must equal the
recorded ones, or the version must be raised. Additions don't count as changes. Neither do comments, docstrings,
annotations, the words of exceptions and the names of local variables. The numbers come from small trainings in float32
on the CPU. They don't cover bfloat16, GPUs, compiled blocks, TrivialAugment, folded batch norms, what a run logs at its
end, and evaluations of weights. For these, only the digests are compared.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effv2.architecture import build_model, count_parameters, parse_table
from effv2.config.schema import (
    FIRST_FIELDS,
    NO_IDENTITY,
    AugmentConfig,
    DataConfig,
    ScheduleConfig,
    StoppingConfig,
    TrainConfig,
)
from effv2.core.provenance import VERSIONS
from effv2.data.batches import NORMALISATIONS, augment, batch_count, epoch_order, normalised
from effv2.data.dataset import Dataset, Split, load_dataset
from effv2.data.images import CentreCrop, Square
from effv2.training.evaluation import evaluate
from effv2.training.loop import Training
from effv2.training.optimisers import Schedule
from effv2.training.progress import Progress

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_suffix(".json")
# The modules behind each version, and those of their definitions that count (none named: all). The stage table is part
# of a run's configuration. The images and their split are part of the digest of its data.
DECIDING: dict[str, dict[str, tuple[str, ...]]] = {
    "decoding": {
        "data/decoder.py": (),
        "data/images.py": ("LabelledImages", "sha256_of", "Square", "CentreCrop", "Preparation"),
    },
    "network": {
        "architecture.py": ("build_model", "_block_config", "Stage", "Table", "count_parameters", "gflops_of"),
    },
    "batches": {
        "data/batches.py": (),
        "data/rand_augment.py": (),
        "data/dataset.py": ("Split", "Dataset", "to_device"),
    },
    "training": {
        "core/randomness.py": (),
        **{f"training/{name}.py": () for name in ("evaluation", "loop", "muon", "optimisers", "progress", "stages")},
        "run/initial.py": ("fitting",),
        "run/records.py": (),
        "run/run.py": ("attempt", "_begun", "_train"),
    },
    "execution": {
        f"execution/{name}": ()
        for name in ("blocks.cpp", "blocks.py", "device.py", "fast_paths.py", "norms.cpp", "norms.py")
    },
    "evaluation": {
        **{f"pretrained/{name}.py": () for name in ("evaluation", "images", "own")},
        "run/weights.py": (),
        "run/records.py": ("write_predictions", "_confusion_figure"),
    },
}
# Modules of the same packages that decide no result, or only what the digest of the data holds.
EXEMPT = {
    "data/folders.py",
    "data/labels.py",
    "data/folder_names.py",
    "data/sources.py",
    "data/torchvision_sets.py",
    "data/inspection.py",
    "execution/resolve.py",
    "training/checkpoint.py",
}
Code = dict[str, dict[str, str]]  # version: "file definition": digest
TOLERANCE = 1e-3  # of losses: processors and releases of torch round differently, and each step amplifies it


def code(root: Path = ROOT / "effv2") -> Code:
    """Return a digest of each definition behind each version."""
    found: Code = {}
    for version, files in DECIDING.items():
        for file, wanted in files.items():
            text = (root / file).read_text()
            whole = {"whole": hashlib.sha256(text.encode()).hexdigest()[:12]}
            for name, digest in (definitions(text) if file.endswith(".py") else whole).items():
                if not wanted or name.partition(".")[0] in wanted or STATEMENT in name:
                    found.setdefault(version, {})[f"{file} {name}"] = digest
    return found


def changed(before: Code, now: Code) -> dict[str, list[str]]:
    """Return by version the recorded definitions that are gone or differ, and the added statements."""
    differing = {
        version: [name for name in before.get(version, {}) if names.get(name) != before[version][name]]
        + [name for name in names if STATEMENT in name and name not in before.get(version, {})]
        for version, names in {**{version: {} for version in before}, **now}.items()
    }
    return {version: names for version, names in differing.items() if names}


def definitions(source: str) -> dict[str, str]:
    """Return a digest for each name that a module or a class defines, and for each other statement in them."""
    found: dict[str, list[str]] = {}
    for name, nodes in _named(ast.parse(source).body, ""):
        found.setdefault(name, []).extend(_written(_Canonical().visit(node)) for node in nodes)
    return {name: hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12] for name, texts in found.items()}


def _named(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, list[ast.AST]]]:
    """Yield the code behind each name. A name that is defined twice comes twice."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield f"{owner}{node.name}", [*node.bases, *node.keywords, *node.decorator_list, _order(node)]
            yield from _named(node.body, f"{owner}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{owner}{node.name}", [node]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                origin = f"{getattr(node, 'module', '')} {alias.name}"
                yield f"{owner}{alias.asname or alias.name}", [ast.Constant(origin)]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and _names(node):
            for name in _names(node):
                if isinstance(node.value, ast.Dict) and not owner:
                    for key, value in zip(node.value.keys, node.value.values, strict=True):
                        yield f"{name}[{ast.unparse(key) if key else '**'}]", [value]
                else:
                    yield f"{owner}{name}", [node.value] if node.value else [ast.Pass()]
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) and not _for_types(node):
            yield f"{STATEMENT}{owner} {ast.unparse(node)}", [node]


STATEMENT = "statement "  # begins the key of a statement that defines no name; an added one counts as a change


def _names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """Return the names that an assignment defines; none if a target is something else, such as an attribute."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [part for each in targets for part in (each.elts if isinstance(each, ast.Tuple) else [each])]
    names = [each.id for each in flat if isinstance(each, ast.Name)]
    return names if len(names) == len(flat) else []


def _order(node: ast.ClassDef) -> ast.AST:
    """Return the fields and special methods of a class in order; all members if it has bases to override."""
    names = [
        each.name if isinstance(each, ast.FunctionDef) else ast.unparse(each.target)
        for each in node.body
        if isinstance(each, (ast.FunctionDef, ast.AnnAssign))
    ]
    fields = {ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)}
    return ast.Constant(" ".join(name for name in names if node.bases or name in fields or name.startswith("__")))


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _written(node: Any) -> str:
    """Write a tree without empty fields, so that releases of Python with more fields write the same."""
    if isinstance(node, list):
        return f"[{' '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind")
    return f"({type(node).__name__} {' '.join(f'{name}={_written(value)}' for name, value in fields)})"


class _Canonical(ast.NodeTransformer):
    """Removes docstrings, annotations and the words of exceptions, and numbers local names."""

    def __init__(self) -> None:
        self._locals: dict[str, str] = {}
        self._inside = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outermost, self._inside = not self._inside, True
        if outermost:
            self._locals = {name: f"local {number}" for number, name in enumerate(_local_names(node))}
        node.returns = None
        node.body = self._without_docstring(node)
        node.name = self._locals.get(node.name, node.name)
        self.generic_visit(node)
        self._inside = not outermost
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = self._without_docstring(node)
        return self.generic_visit(node)

    @staticmethod
    def _without_docstring(node: ast.FunctionDef | ast.ClassDef) -> list[ast.stmt]:
        return node.body if ast.get_docstring(node, clean=False) is None else node.body[1:] or [ast.Pass()]

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._locals.get(node.id, node.id), node.ctx)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        node.name = self._locals.get(node.name or "", node.name)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.generic_visit(ast.Assign([node.target], node.value or ast.Constant(None)))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Assert(self.visit(node.test))


def _local_names(function: ast.AST) -> list[str]:
    """Return variables and inner functions in order of appearance, without parameters: callers may name those."""
    names: dict[str, None] = {}
    shared: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            shared.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names[node.name] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        elif isinstance(node, ast.FunctionDef) and node is not function:
            names[node.name] = None
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            shared.update(node.names)
    return [name for name in names if name not in shared]


# The versions that each number depends on. If one is raised, the number may differ. Splits have their own digest.
TRAINED = ("network", "batches", "training", "execution")
DEPENDS = {
    **dict.fromkeys(("square", "square of 16 bits", "centre crop"), ("decoding",)),
    **dict.fromkeys(("images", "augmented", "normalised", "batches", "order"), ("batches",)),
    **dict.fromkeys(("rates under plateau", "stops"), ("training",)),
    "parameters without squeeze-and-excitation": ("network",),
    "standard split": (),
    "published split": (),
}


def numbers() -> dict[str, Any]:
    """Return the results of small computations: digests, which are exact on every machine, and losses."""
    return {**_exact(), **_losses()}


def defaults() -> dict[str, Any]:
    """Return the defaults of the settings that an identity omits at their default. They must not change."""
    return {name: value for name, value in TrainConfig().flat().items() if name not in FIRST_FIELDS | NO_IDENTITY}


def _exact() -> dict[str, str]:
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (16, 3, 12, 12), dtype=np.uint8))
    torch.manual_seed(0)
    augmented = augment(images, AugmentConfig(crop=2, flip=True, erasing=0.5))
    with tempfile.TemporaryDirectory() as folder:
        coloured, deep = Path(folder, "image.png"), Path(folder, "deep.png")
        Image.fromarray(generator.integers(0, 256, (13, 17, 4), dtype=np.uint8)).save(coloured)
        Image.fromarray(generator.integers(0, 65536, (13, 17), dtype=np.uint16)).save(deep)
        arrays = {
            "square": Square(8)(Image.open(coloured)),
            "square of 16 bits": Square(8)(Image.open(deep)),
            "centre crop": CentreCrop(8, 10, "bilinear")(Image.open(coloured)),
        }
    split = Split(images.permute(0, 2, 3, 1), torch.arange(16).flip(0), torch.zeros(16), tuple(map(str, range(16))))
    scaled = normalised(images, NORMALISATIONS["imagenet"], channels_last=False)
    accuracies = [0.1, 0.3, 0.2, 0.3, 0.1, 0.2, 0.31, 0.3, 0.2, 0.1]
    table = parse_table("F 1 3 1 8 8 1 / M 2 3 2 8 16 2 noSE")
    arrays |= {
        "augmented": augmented.numpy(),
        "images": split.images(torch.tensor([3, 1])).numpy(),
        "normalised": (scaled * 1000).round().to(torch.int32).numpy(),
        "batches": np.array([batch_count(count, 16) for count in (15, 16, 17, 18, 785)]),
        "order": epoch_order(50, seed=3, epoch=2).numpy(),
        "rates under plateau": np.array(_rates(accuracies)),
        "stops": np.array([_stop(accuracies, since) for since in ("start", "min_epochs")]),
        "parameters without squeeze-and-excitation": np.array(count_parameters(build_model(table, 10))),
    }
    splits = {
        "standard split": DataConfig(image_size=8, per_class=20),
        "published split": DataConfig(image_size=8, per_class=20, sampling="published", validation_fraction=0),
    }
    return {name: _digest(array) for name, array in arrays.items()} | {
        name: load_dataset(config).digest() for name, config in splits.items()
    }


def _rates(accuracies: list[float]) -> list[int]:
    """Return log10 of the learning rate after each epoch, under plateau with a patience of one."""
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = Schedule(ScheduleConfig(name="plateau", plateau_patience=1), optimiser, 1)
    rates = []
    for epoch, accuracy in enumerate(accuracies, 1):
        schedule.after_epoch(epoch, accuracy)
        rates.append(round(math.log10(schedule.rate)))
    return rates


def _stop(accuracies: list[float], since: Any) -> int:
    """Return the epoch after which a training with these accuracies stops."""
    progress, rule = Progress(), StoppingConfig(min_epochs=3, patience=2, best_since=since)
    for progress.epoch, accuracy in enumerate(accuracies, 1):
        progress.history.append({"test/accuracy": accuracy})
        if progress.should_stop(rule):
            break
    return progress.epoch


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def _losses() -> dict[str, list[float]]:
    """Return the losses of short trainings on random images with several optimisers, schedules and settings."""
    table = "F 1 3 1 8 8 1 / F 2 3 2 8 16 1 / M 4 3 2 16 24 2"
    shared = {"data": {"image_size": 16}, "execution": {"device": "cpu", "precision": "fp32"}}
    trainings: Mapping[str, dict[str, Any]] = {
        "adamw, cosine, augmented, averaged": {
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
            "schedule": {"name": "onecycle", "epochs": 3},
            "zero_init_residual": True,
        },
    }
    found = {}
    for name, settings in trainings.items():
        model: dict[str, Any] = {key: settings[key] for key in ("outputs", "zero_init_residual") if key in settings}
        groups = {key: value for key, value in settings.items() if isinstance(value, dict)}
        model |= {"variant": "recorded", "table": table}
        config = TrainConfig.model_validate(shared | groups | {"model": model})
        training = Training(config, _random_images())
        losses = [metrics[f"{of}/loss"] for metrics in training for of in ("train", "val")]
        training.state.take_selected()
        last = evaluate(training.network_for_inference(), training.dataset.test, config.evaluation.batch_size)
        found[name] = [round(loss, 6) for loss in (*losses, last.loss)]
    return found


def _random_images() -> Dataset:
    """Return three splits of random images, so that losses depend on no data set."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (count,), generator=generator)
        return Split(pixels, torch.arange(count), labels, tuple(map(str, range(count))))

    return Dataset("random", "", tuple(map(str, range(10))), split(120), split(40), split(40))


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the recorded numbers that differ now or are missing."""

    def same(old: Any, new: Any) -> bool:
        if isinstance(old, str):
            return bool(old == new)
        return len(old) == len(new) and bool(np.allclose(old, new, rtol=TOLERANCE))

    return [name for name, old in before.items() if name not in now or not same(old, now[name])]


def refusals(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say why the current state can't be recorded: results differ, or may differ, and no version was raised."""
    old, new = before["versions"], now["versions"]
    raised = {version for version in new if new[version] > old.get(version, 0)}
    said = [
        f"{version} was {old[version]}: versions only rise" for version in old if new.get(version, 0) < old[version]
    ]
    said += [
        f"the default of {name} was {value}: settings that identities leave out must keep theirs"
        for name, value in before["defaults"].items()
        if now["defaults"].get(name) != value
    ]
    others = differing(before["numbers"], now["numbers"])
    for version in changed(before["code"], now["code"]).keys() - raised:
        about = {name for name in before["numbers"] if version in DEPENDS.get(name, TRAINED)}
        if found := sorted(about.intersection(others)):
            said.append(
                f"{version} changed, and so did {', '.join(found)}: raise {version}, or record it by itself first"
            )
    for name in others:
        versions = DEPENDS.get(name, TRAINED)
        if versions and not raised.intersection(versions):
            said.append(f"{name} differs: raise what changed of {', '.join(versions)}")
    return said


def main() -> None:
    """Record again, unless results differ and no version was raised. Equal losses stay as recorded."""
    now: dict[str, Any] = {"versions": VERSIONS, "defaults": defaults(), "code": code(), "numbers": numbers()}
    before: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else now
    if said := refusals(before, now):
        sys.exit("Not recorded. " + ". ".join(said) + ".")
    equal = before["numbers"].keys() - set(differing(before["numbers"], now["numbers"]))
    now["numbers"] |= {name: before["numbers"][name] for name in equal if name in now["numbers"]}
    RECORDED.write_text(json.dumps(now, indent=1) + "\n")
    for version, names in changed(before["code"], now["code"]).items():
        sys.stdout.write(f"{version}: confirmed {', '.join(names)}\n")


if __name__ == "__main__":
    main()
