"""The model card of a release, made from the records of its run alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from mdeq import SolveStatus
from tools.batches import evaluated_split
from tools.known_data import Dataset, data_of
from tools.recheck import evaluated_config
from tools.scores import CLASS_SCORES, SCORES
from tools.steps import ALL

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


def model_card(repo: str, config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the model card, README.md of the repository.

    Args:
        repo: `ORG/NAME`.
        config: the config.json.
        record: see `tools.publish.record_of`.
    """
    data, name = data_of(record), repo.rpartition("/")[2]
    kind = "deep equilibrium model" if config["architecture"].startswith("deq") else "multiscale deep equilibrium model"
    parts = [
        f"---\n{front_matter(name, config, record)}\n---",
        f"# {name}",
        f"`{config['architecture']}` ({record['evaluation']['parameters']:,} parameters) trained on {data.title}: a "
        f"{kind} of the package mdeq-vision. Its features are the fixed point of one "
        "learned cell, found by a root solver.",
        *results(name, record),
        *steps_table(record["steps"], record["evaluation"]["metric"], split_of(record), steps_command(record)),
        *explicit_network(record),
        usage(repo, config, data),
        *training(record, data),
        *limits(record, data),
        f"## Licence\n\n{licence(config['pretrained_cfg'].get('license'), data)}",
        f"## Citation\n\nData: {data.citation}.\n\n```bibtex\n{PAPERS}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def licence(weights: str | None, data: Dataset) -> str:
    """Return what may be done with code, weights and data."""
    if weights == "apache-2.0":
        return f"Weights and code: Apache-2.0. Data: {data.licence}."
    text = f"Code: Apache-2.0. Data: {data.licence}. "
    if weights is None:
        return f"{text}The licence of the weights was not recorded: it depends on the data of their training."
    if weights != data.weights_licence:
        text += f"The weights started from others, whose licence they follow too ({weights}). "
    return f"{text}The weights were trained on these data and are meant for what their licence permits."


def front_matter(name: str, config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    data, evaluation = data_of(record), record["evaluation"]
    score = SCORES[evaluation["metric"]]
    result = EvalResult(
        task_type=data.task,
        dataset_type=record["data"],
        dataset_name=data.title,
        metric_type=score.hub,
        metric_name=score.title,
        metric_value=round(evaluation["metrics"][score.key], 4),
    )
    return ModelCardData(
        model_name=name,
        license=config["pretrained_cfg"].get("license"),
        library_name="timm",
        pipeline_tag=None if data.task == "other" else data.task,
        tags=["timm", "mdeq", "deep-equilibrium-model", config["architecture"]],
        eval_results=[result],
    ).to_yaml()


def _number(value: float | None, digits: str = ".2e") -> str:
    return "not finite" if value is None else format(value, digits)


def results(name: str, record: Mapping[str, Any]) -> list[str]:
    """Return the section of what was measured: metric with seeds, cost, residual, status."""
    evaluation = record["evaluation"]
    metrics, twice, key = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"], evaluation["metric"]
    words, unit = SCORES[key].title, SCORES[key].unit
    solver = evaluation["solver"]
    rows = [
        (f"{words}, at {solver['max_steps']} steps at most", f"{_number(metrics[key], '.4g')}{unit}"),
        (
            f"{words}, at twice the steps ({2 * solver['max_steps']}, without tolerance)",
            f"{_number(twice[key], '.4g')}{unit}",
        ),
        ("evaluations of f, mean", _number(metrics["evaluations"], ".1f")),
        (f"residual ({solver['stop_mode']}.), mean", _number(metrics["residual_mean"])),
        *((f"residual, {q} quantile", _number(metrics[f"residual_q{q}"])) for q in ("0.5", "0.9", "0.99")),
        *((f"share of samples: {s.name.lower()}", f"{100 * metrics[s.name.lower()]:.1f} %") for s in SolveStatus),
    ]
    others = [score for score in SCORES.values() if score.key in metrics and score.key != key]
    rows[2:2] = [(score.title, f"{_number(metrics[score.key], '.4g')}{score.unit}") for score in others]
    for score in CLASS_SCORES:
        classes = score.by_class(metrics).items()
        rows += [(f"{score.name} of {label}", f"{_number(value, '.4g')}{score.unit}") for label, value in classes]
    settings = f"; of the data `{' '.join(evaluation['settings'])}`" if "settings" in evaluation else ""
    by_seed = ", ".join(f"{_number(s['value'], '.4g')}{unit} (seed {s['seed']})" for s in record["seeds"])
    return [
        "## Results",
        _table(("measured", "value"), rows),
        f"{words} by seed: {by_seed}. The weights are those of seed {record['training']['seed']}. Settings: "
        f"`{_call(solver)}`{settings}; the published tolerance is {solver['tol']:g} ({solver['stop_mode']}.).",
        "Measured by the first command; if this is a release of the package, the second one "
        f"reproduces the figure from the weights alone.\n\n```bash\n{evaluation['command']}\n"
        f"python tools/validate.py --record mdeq/weights/{name}.json data.root=DIR\n```",
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
    head = (
        "weights", "data", "metric", "score", "twice the steps", "explicit net", "evaluations", "mean residual",
        "converged", "trained",
    )  # fmt: skip
    return _table(head, [_release_row(name, record) for name, record in records.items()])


def _release_row(name: str, record: Mapping[str, Any]) -> list[str]:
    run, evaluation = record["training"], record["evaluation"]
    metrics, twice, key = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"], evaluation["metric"]
    words, unit = SCORES[key].title, SCORES[key].unit
    digits = ".3f" if unit == "" else ".1f"
    values = [record_seed["value"] for record_seed in record["seeds"]]
    told = f"mean {sum(values) / len(values):{digits}}, {min(values):{digits}} to {max(values):{digits}}"
    spread = f" ({told}, {len(values)} seeds)" if len(values) > 1 else ""
    beside = record.get("baseline")
    stages = [*record.get("stages", []), run]
    epochs = " + ".join(str(stage["epochs"]) for stage in stages)
    times = [stage.get("minutes") for stage in stages]
    minutes = "" if None in times else f", {sum(times):.0f} min"
    return [
        f"`{name}`",
        data_of(record).title,
        words,
        f"{_number(metrics[key], digits)}{unit}{spread}",
        f"{_number(twice[key], digits)}{unit}",
        "" if beside is None else f"{_number(beside['metrics'][key], digits)}{unit}",
        _number(metrics["evaluations"], ".1f"),
        _number(metrics["residual_mean"], ".1e"),
        f"{100 * metrics['converged']:.1f} %",
        f"{epochs} epochs{minutes}, {run.get('hardware', 'hardware not recorded')}",
    ]


def split_of(record: Mapping[str, Any]) -> str:
    """Return the name of the split that was evaluated."""
    return evaluated_split(evaluated_config(record, record["data"]).data)


def steps_command(record: Mapping[str, Any]) -> str | None:
    """Return the command that measured accuracy against steps, where it is known and not that of the evaluation."""
    command = record.get("steps_by", {}).get("command")
    return None if command == record["evaluation"].get("command") else command


def explicit_network(record: Mapping[str, Any]) -> list[str]:
    """Return the section on the explicit network that was trained beside the model, where one was."""
    net = record.get("baseline")
    if net is None:
        return []
    evaluation, key = record["evaluation"], record["evaluation"]["metric"]
    words, unit = SCORES[key].title, SCORES[key].unit
    stages = [*record.get("stages", []), record["training"]]
    rows = [
        (name, f"{parameters:,}", str(epochs), f"{_number(metrics[key], '.4g')}{unit}")
        for name, parameters, epochs, metrics in (
            ("this", evaluation["parameters"], sum(s["epochs"] for s in stages), evaluation["metrics"]),
            (f"timm's {net['net']}", net["parameters"], net["epochs"], net["metrics"]),
        )
    ]
    return [
        "### Beside an explicit network",
        _table(("network", "parameters", "epochs", words), rows),
        f"Trained on the same files, seed {net['seed']}, {net['minutes']:.0f} minutes on {net['hardware']}:\n\n"
        f"```bash\n{net['command']}\n```",
    ]


def steps_table(
    rows: Sequence[Mapping[str, Any]], metric: str, split: str = "test", command: str | None = None
) -> list[str]:
    """Return the section of accuracy against steps: its rows, the split they are of, the command that made them."""
    if not rows:
        return ["The metric against the number of solver steps was not measured."]
    words, unit = SCORES[metric].title, SCORES[metric].unit
    of = f" ({unit.strip()})" if unit else ""
    heads = {
        "steps": "steps",
        metric: words + of,
        "evaluations": "evaluations",
        "residual_mean": "mean residual",
        f"twin_{metric}": f"{words} of the twin{of}",
    }
    columns = [c for c in heads if c in rows[0]]
    body = [[_number(row[c] if row[c] is None else float(row[c]), ".4g") for c in columns] for row in rows]
    samples = rows[0].get("samples", ALL)
    where = f"the whole {split} split" if samples == ALL else f"{samples} samples spread over the {split} split"
    told = "" if command is None else f"\n\n```bash\n{command}\n```"
    return [
        "### Against the number of solver steps",
        _table([heads[c] for c in columns], body),
        f"On {where}. The twin is f applied the same number of times, without a solver (shared weights).{told}",
    ]


def usage(repo: str, config: Mapping[str, Any], data: Dataset) -> str:
    """Return the section of code to copy."""
    cfg, args = config["pretrained_cfg"], config.get("model_args", {})
    volume = args.get("spatial_dims") == 3 or config["architecture"].partition("_")[0].endswith("3d")
    size = tuple(cfg["input_size"])
    patch = (config.get("preprocessing") or {}).get("patch_size")  # cfg's size has two axes, as timm wants it
    space = (patch or (size[-1], *size[1:])) if volume else size[1:]
    shape = ", ".join(map(str, (1, size[0], *space)))
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
    if data.prepared:
        text += f"\n\n{data.prepared}"
    if "preprocessing" in config:
        text += f"\n\nPreprocessing of the training volumes: `{_call(config['preprocessing'])}`."
    if data.task == "image-classification":
        text += f"""

With transformers, `import mdeq` first: `AutoModelForImageClassification.from_pretrained("{repo}")`."""
    return text


def training(record: Mapping[str, Any], data: Dataset) -> list[str]:
    """Return the section of how the weights came about."""
    run = record["training"]
    held_out = yaml.safe_load(record["config"])["data"].get("holdout")
    without = "" if held_out is None else f", the last {held_out:,} training samples held out"
    text = f"Data: {data.title}{without}. Seed {run['seed']}, {run['epochs']} epochs"
    if "command" in run:
        time = "over several sessions" if run["minutes"] is None else f"{run['minutes']:.0f} minutes"
        versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        text += f", {time} on {run['hardware']}; {versions}. At that commit the command was\n\n"
        text += f"```bash\n{run['command']}\n```"
    else:
        text += "; time and hardware were not recorded."
    for stage in reversed(record.get("stages", [])):
        command = f":\n\n```bash\n{stage['command']}\n```" if "command" in stage else "."
        time = f", {stage['minutes']:.0f} minutes" if stage.get("minutes") is not None else ""
        sha = "not kept" if stage.get("sha256") is None else f"sha256 {stage['sha256'][:12]}"
        text += f"\n\nIt started from weights ({sha}) of {stage['epochs']} epochs{time}, seed {stage['seed']}{command}"
    config = f"The effective config of the training:\n\n```yaml\n{record['config'].strip()}\n```"
    return [
        "## Training",
        text,
        config,
        "The weights come with the solver of the evaluation, not that of the training.",
    ]


def limits(record: Mapping[str, Any], data: Dataset) -> list[str]:
    """Return the section of what not to expect."""
    evaluation = record["evaluation"]
    metrics, twice, name = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"], evaluation["metric"]
    found = [f"{100 * (1 - metrics['converged']):.1f} % of the {split_of(record)} samples did not reach the tolerance."]
    if None not in (metrics[name], twice[name]):
        change = twice[name] - metrics[name]
        found.append(
            f"At twice the steps the metric changes by {change:+.3g}{SCORES[name].unit.replace('%', 'points')}."
        )
    if len(record["seeds"]) == 1:
        found.append("Only one seed was trained; the spread over seeds is not known.")
    found += [*data.caveats, *filter(None, [evaluation.get("data_note")]), *record["notes"]]
    return ["## Limits", "\n".join(f"- {line}" for line in found)]
