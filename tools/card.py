"""The model card of a release, made from the records of its run alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mdeq import SolveStatus
from tools.segmentation_data import CAMVID_CLASSES, CITYSCAPES_CLASSES
from tools.steps import ALL


@dataclass(frozen=True)
class Dataset:
    """What a card says of a data set."""

    title: str
    licence: str
    citation: str
    task: str = "image-classification"
    labels: tuple[str, ...] = ()
    warning: str = ""


CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASETS = {
    "digits": Dataset(
        "scikit-learn's handwritten digits",
        "CC BY 4.0",
        "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998",
        labels=tuple("0123456789"),
    ),
    "cifar10": Dataset(
        "CIFAR-10",
        "not stated by its authors, who ask for a citation",
        "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        labels=CIFAR10_LABELS,
    ),
    "cityscapes": Dataset(
        "Cityscapes",
        "non-commercial use only, see cityscapes-dataset.com/license",
        "M. Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016",
        "image-segmentation",
        labels=CITYSCAPES_CLASSES,
    ),
    "camvid": Dataset(
        "CamVid",
        "CC BY-NC 4.0, personal and research use",
        "G. Brostow et al., Semantic Object Classes in Video, Pattern Recognition Letters 2009",
        "image-segmentation",
        labels=CAMVID_CLASSES,
    ),
    "hippocampus": Dataset(
        "Medical Segmentation Decathlon, Task04 Hippocampus",
        "CC BY-SA 4.0",
        "M. Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022",
        "image-segmentation",
        warning="It is no medical device; it must not be used for diagnosis or treatment.",
    ),
    "modelnet10": Dataset(
        "ModelNet10, voxelised",
        "academic research only, as far as is known",
        "Z. Wu et al., 3D ShapeNets, CVPR 2015",
        "other",
    ),
    "medmnist3d": Dataset(
        "MedMNIST3D",
        "CC BY 4.0",
        "J. Yang et al., MedMNIST v2, Scientific Data 2023",
        "other",
        warning="It is no medical device; it must not be used for diagnosis or treatment.",
    ),
}

# Name in the records -> type of metric on the Hub, words, unit.
METRICS = {
    "top1": ("accuracy", "Top-1 accuracy", " %"),
    "top5": ("accuracy", "Top-5 accuracy", " %"),
    "mean_dice": ("dice", "Mean Dice", ""),
    "miou": ("mean_iou", "Mean IoU", " %"),
    "auc": ("roc_auc", "AUC", ""),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy", " %"),
    "pixel_accuracy": ("accuracy", "Pixel accuracy", " %"),
    "hd95": ("hausdorff_distance", "Mean HD95", " mm"),
}
CLASS_METRICS = {"dice_": ("Dice", ""), "iou_": ("IoU", " %"), "hd95_": ("HD95", " mm")}

PAPERS = """\
@inproceedings{bai2020mdeq,
  title={Multiscale Deep Equilibrium Models},
  author={Bai, Shaojie and Koltun, Vladlen and Kolter, J. Zico},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}
@inproceedings{bai2021stabilizing,
  title={Stabilizing Equilibrium Models by Jacobian Regularization},
  author={Bai, Shaojie and Koltun, Vladlen and Kolter, J. Zico},
  booktitle={International Conference on Machine Learning},
  year={2021}
}"""


def dataset(name: str) -> Dataset:
    """Return what is known of a data set; of one that is not in the table, its name alone."""
    return DATASETS.get(name) or Dataset(name, "not recorded", "not recorded")


def model_card(repo: str, config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the model card, README.md of the repository.

    Args:
        repo: `ORG/NAME`.
        config: the config.json.
        record: see `tools.publish.record_of`.
    """
    data, name = dataset(record["data"]), repo.rpartition("/")[2]
    parts = [
        f"---\n{front_matter(name, config, record)}\n---",
        f"# {name}",
        f"`{config['architecture']}` ({record['evaluation']['parameters']:,} parameters) trained on {data.title}: a "
        "multiscale deep equilibrium model (MDEQ) of the package mdeq-vision. Its features are the fixed point of one "
        "learned cell, found by a root solver.",
        *results(record),
        *steps_table(record["steps"], record["evaluation"]["metric"]),
        usage(repo, config, data),
        *training(record, data),
        *limits(record, data),
        f"## Licence\n\nWeights and code: Apache-2.0. Data: {data.licence}.",
        f"## Citation\n\nData: {data.citation}.\n\n```bibtex\n{PAPERS}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(name: str, config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    data, evaluation = dataset(record["data"]), record["evaluation"]
    kind, words, _unit = _metric(evaluation["metric"])
    result = EvalResult(
        task_type=data.task,
        dataset_type=record["data"],
        dataset_name=data.title,
        metric_type=kind,
        metric_name=words,
        metric_value=round(evaluation["metrics"][evaluation["metric"]], 4),
    )
    return ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="timm",
        pipeline_tag=None if data.task == "other" else data.task,
        tags=["timm", "mdeq", "deep-equilibrium-model", config["architecture"]],
        eval_results=[result],
    ).to_yaml()


def _metric(name: str) -> tuple[str, str, str]:
    return METRICS.get(name, (name, name, ""))


def _number(value: float | None, digits: str = ".2e") -> str:
    return "not finite" if value is None else format(value, digits)


def results(record: Mapping[str, Any]) -> list[str]:
    """Return the section of what was measured: metric with seeds, cost, residual, status."""
    evaluation = record["evaluation"]
    metrics, twice, name = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"], evaluation["metric"]
    _kind, words, unit = _metric(name)
    solver = evaluation["solver"]
    rows = [
        (f"{words}, at {solver['max_steps']} steps at most", f"{_number(metrics[name], '.4g')}{unit}"),
        (
            f"{words}, at twice the steps ({2 * solver['max_steps']}, without tolerance)",
            f"{_number(twice[name], '.4g')}{unit}",
        ),
        ("evaluations of f, mean", _number(metrics["evaluations"], ".1f")),
        (f"residual ({solver['stop_mode']}.), mean", _number(metrics["residual_mean"])),
        *((f"residual, {q} quantile", _number(metrics[f"residual_q{q}"])) for q in ("0.5", "0.9", "0.99")),
        *((f"share of samples: {s.name.lower()}", f"{100 * metrics[s.name.lower()]:.1f} %") for s in SolveStatus),
    ]
    others = [key for key in METRICS if key in metrics and key != name]
    rows[2:2] = [(_metric(key)[1], f"{_number(metrics[key], '.4g')}{_metric(key)[2]}") for key in others]
    for prefix, (title, of) in CLASS_METRICS.items():
        classes = [key for key in metrics if key.startswith(prefix) and key != "hd95_undefined"]
        rows += [(f"{title} of {key.removeprefix(prefix)}", f"{_number(metrics[key], '.4g')}{of}") for key in classes]
    by_seed = ", ".join(f"{_number(s['value'], '.4g')}{unit} (seed {s['seed']})" for s in record["seeds"])
    return [
        "## Results",
        _table(("measured", "value"), rows),
        f"{words} by seed: {by_seed}. The weights are those of seed {record['training']['seed']}. Settings: "
        f"`{_call(solver)}`; the published tolerance is {solver['tol']:g} ({solver['stop_mode']}.).",
        f"```bash\n{evaluation['command']}\n```",
    ]


def _call(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def releases_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row for each release.

    Args:
        records: by `architecture.tag`; see `tools.publish.record_of`.
    """
    head = ("weights", "data", "metric", "test", "twice the steps", "evaluations", "mean residual", "trained")
    return _table(head, [_release_row(name, record) for name, record in records.items()])


def _release_row(name: str, record: Mapping[str, Any]) -> list[str]:
    run, evaluation = record["training"], record["evaluation"]
    metrics, twice, key = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"], evaluation["metric"]
    _kind, words, unit = _metric(key)
    digits = ".3f" if unit == "" else ".1f"
    values = [record_seed["value"] for record_seed in record["seeds"]]
    spread = f" ({min(values):{digits}} to {max(values):{digits}}, {len(values)} seeds)" if len(values) > 1 else ""
    stages = [*record.get("stages", []), run]
    epochs = " + ".join(str(stage["epochs"]) for stage in stages)
    times = [stage.get("minutes") for stage in stages]
    minutes = "" if None in times else f", {sum(times):.0f} min"
    return [
        f"`{name}`",
        dataset(record["data"]).title,
        words,
        f"{_number(metrics[key], digits)}{unit}{spread}",
        f"{_number(twice[key], digits)}{unit}",
        _number(metrics["evaluations"], ".1f"),
        _number(metrics["residual_mean"], ".1e"),
        f"{epochs} epochs{minutes}, {run.get('hardware', 'hardware not recorded')}",
    ]


def steps_table(rows: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Return the section of accuracy against steps, from its rows."""
    if not rows:
        return ["The metric against the number of solver steps was not measured."]
    columns = [c for c in ("steps", metric, "evaluations", "residual_mean", f"twin_{metric}") if c in rows[0]]
    body = [[_number(row[c], ".4g") for c in columns] for row in rows]
    samples = rows[0].get("samples", ALL)
    where = "the whole test split" if samples == ALL else f"{samples} samples spread over the test split"
    return [
        "### Against the number of solver steps",
        _table([c.replace("_", " ") for c in columns], body),
        f"On {where}. `twin`: f applied as often without a solver, the explicit twin of shared weights.",
    ]


def usage(repo: str, config: Mapping[str, Any], data: Dataset) -> str:
    """Return the section of code to copy."""
    cfg, args = config["pretrained_cfg"], config.get("model_args", {})
    volume = args.get("spatial_dims") == 3 or config["architecture"].partition("_")[0].endswith("3d")
    size = tuple(cfg["input_size"])
    shape = ", ".join(map(str, (1, size[0], size[-1], *size[1:]) if volume else (1, *size)))
    text = f"""## Use

```bash
pip install mdeq-vision
```

```python
import mdeq  # registers the models
import timm
import torch

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
logits, equilibrium = model(torch.randn({shape}), return_equilibrium=True)
print(logits.shape, equilibrium.stats.status, equilibrium.stats.residual)
```"""
    if "preprocessing" in config:
        text += f"\n\nWhat the model expects of a volume: `{_call(config['preprocessing'])}`."
    if data.task == "image-classification":
        text += f"""

With transformers, `import mdeq` first: `AutoModelForImageClassification.from_pretrained("{repo}")`."""
    return text


def training(record: Mapping[str, Any], data: Dataset) -> list[str]:
    """Return the section of how the weights came about."""
    run = record["training"]
    text = f"Data: {data.title}. Seed {run['seed']}, {run['epochs']} epochs"
    if "command" in run:
        time = "over several sessions" if run["minutes"] is None else f"{run['minutes']:.0f} minutes"
        versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        text += f", {time} on {run['hardware']}; {versions}.\n\n```bash\n{run['command']}\n```"
    else:
        text += "; time and hardware were not recorded."
    for stage in reversed(record.get("stages", [])):
        command = f":\n\n```bash\n{stage['command']}\n```" if "command" in stage else "."
        text += (
            f"\n\nIt started from weights (sha256 {stage['sha256'][:12]}) of {stage['epochs']} epochs, seed "
            f"{stage['seed']}{command}"
        )
    return ["## Training", text, f"The effective config:\n\n```yaml\n{record['config'].strip()}\n```"]


def limits(record: Mapping[str, Any], data: Dataset) -> list[str]:
    """Return the section of what not to expect."""
    evaluation = record["evaluation"]
    metrics, twice, name = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"], evaluation["metric"]
    found = [f"{100 * (1 - metrics['converged']):.1f} % of the test samples did not reach the tolerance."]
    if None not in (metrics[name], twice[name]):
        change = twice[name] - metrics[name]
        found.append(
            f"At twice the steps the metric changes by {change:+.3g}{_metric(name)[2].replace('%', 'points')}."
        )
    if len(record["seeds"]) == 1:
        found.append("One seed was trained: how far another one would be is not known.")
    if data.warning:
        found.append(data.warning)
    found += record["notes"]
    return ["## Limits", "\n".join(f"- {line}" for line in found)]
