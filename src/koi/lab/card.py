"""A model card: what a trained model is, for people and for the Hugging Face Hub.

The card is the README.md beside the model's file. Its head, in YAML, is what the Hub reads; it is
made by the Hub's own library, and without that the card is for people alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from koi import allowed
from koi.errors import ConfigurationError, printable
from koi.lab.markdown import block, code, link, text

# Whose the algorithms of `koi.algorithms` are.
_REPTILE = "Nichol et al., 2018", "1803.02999"
_MAML = "Finn et al., 2017", "1703.03400"
_PAPERS = {
    "reptile": _REPTILE,
    "fomaml": _MAML,
    "maml": _MAML,
    "eigen-reptile": ("Chen et al., 2022", "2206.01944"),
}
_NEEDED = ("name", "description", "license", "model", "settings", "data")
_DATA = ("name", "license")
_RESULT = ("task", "metric", "value")


def model_card(config: Mapping[str, Any], results: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the card of a model that Koi trained, in Markdown with the head that the Hub reads.

    The head is there where ``huggingface_hub`` is installed (``pip install "koi-x[hub]"``).

    Args:
        config: what was run. Needed are ``name`` (of the model), ``description`` (a sentence or
            two), ``license`` (of the weights, as the Hub spells it, such as "mit"), ``model`` (the
            Python expression that makes the module, such as
            "koi.models.omniglot_net(num_classes=5)"), ``settings`` (what `koi.Koi` was given) and
            ``data`` (with ``name``, ``license`` and, if it has any, ``url`` and ``id``, its name
            on the Hub). Optional are ``learner`` (the expression that makes the `koi.Koi` which
            adapts ``model``), ``checkpoint`` (the name of a file of `koi.Koi.save`, if ``learner``
            loads it; without one the weights adapt from fresh moments, also where ``results`` were
            measured with those of the training), ``command`` and ``versions`` (package -> version).
        results: what was measured, each with ``task`` ("5-way 1-shot"), ``metric`` ("accuracy"),
            ``value`` and, if there are any, ``interval``, the half-width of its 95 % interval, and
            ``num_skipped``, how many tasks were left out as not finite.

    Whatever the texts hold is shown as it is: no HTML, link, fence or table is made by them.

    Raises:
        ConfigurationError: something that is needed is missing, or of another kind.

    >>> card = model_card(
    ...     {
    ...         "name": "sine",
    ...         "description": "Fits a sine wave from ten points.",
    ...         "license": "mit",
    ...         "model": "koi.models.sine_mlp()",
    ...         "settings": {"step_size": 0.02, "num_steps": 5},
    ...         "data": {"name": "sine waves", "license": "none: they are computed"},
    ...     },
    ...     [{"task": "10 points", "metric": "mse", "value": 0.312, "interval": 0.051}],
    ... )
    >>> print(card[card.index("# sine") :].split("## Use")[0])
    # sine
    <BLANKLINE>
    Fits a sine wave from ten points.
    <BLANKLINE>
    ## Results
    <BLANKLINE>
    | task | metric | value | 95 % interval |
    | :-- | :-- | --: | --: |
    | 10 points | mse | 0.312 | ± 0.051 |
    <BLANKLINE>
    <BLANKLINE>
    """
    _check(config, results)
    parts = [f"# {text(config['name'])}", text(config["description"])]
    if results:
        parts += ["## Results", _results(results)]
    parts += ["## Use", _use(config), "## Training", _training(config), "## Data"]
    parts += [_data(config["data"]), "## Licence", f"Of these weights: {text(config['license'])}."]
    return _head(config, results) + "\n\n".join(parts) + "\n"


def _check(config: Any, results: Any) -> None:
    mapping = allowed.instance(Mapping, "a dictionary")
    allowed.check(config=(config, mapping), results=(results, allowed.each(mapping, "results")))
    data = config.get("data")
    parts: list[tuple[str, Any, Iterable[str]]] = [
        ("the config of a model card lacks", config, _NEEDED),
        ("the data of a model card lack", data if isinstance(data, Mapping) else _DATA, _DATA),
        *((f"result {i} of a model card lacks", each, _RESULT) for i, each in enumerate(results)),
    ]
    problems = [f"{what} {key!r}" for what, part, keys in parts for key in keys if key not in part]
    if problems:
        raise ConfigurationError(problems)
    kinds = allowed.named(allowed.instance(object, "anything"))
    allowed.check(**{f"config[{name!r}]": (config[name], kinds) for name in ("settings", "data")})
    allowed.check(versions=(config.get("versions", {}), kinds))
    for result in results:
        allowed.check(
            value=(result["value"], _number),
            interval=(result.get("interval", 0), _number),
            num_skipped=(result.get("num_skipped", 0), allowed.count(0)),
        )


_number = allowed.that(
    lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"
)


def _head(config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """Return the front matter, nothing where the Hub's library is not installed."""
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        return ""
    data = {name: _plain(value) for name, value in config["data"].items()}
    algorithm = _plain(config["settings"].get("algorithm", "reptile"))
    evaluations = [
        EvalResult(
            task_type="few-shot-learning",
            task_name=_plain(result["task"]),
            dataset_type=data.get("id", data["name"]),
            dataset_name=data["name"],
            dataset_config=_plain(result["task"]),  # results are told apart by it, not by task_name
            metric_type=_plain(result["metric"]),
            metric_value=_rounded(result["value"]),
        )
        for result in results
    ]
    head = ModelCardData(
        license=_plain(config["license"]),
        library_name="pytorch",
        tags=["koi", "meta-learning", "few-shot-learning", algorithm],
        datasets=[data["id"]] if "id" in data else None,
        model_name=_plain(config["name"]),
        eval_results=evaluations or None,
    )
    return f"---\n{head.to_yaml()}\n---\n\n"


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| task | metric | value | 95 % interval |", "| :-- | :-- | --: | --: |"]
    for result in results:
        interval = f"± {result['interval']:.2g}" if "interval" in result else ""
        skipped = result.get("num_skipped", 0)
        left_out = f" ({skipped:,} tasks left out as not finite)" if skipped else ""
        task, metric = text(result["task"]) + left_out, text(result["metric"])
        rows.append(f"| {task} | {metric} | {result['value']:.4g} | {interval} |")
    return "\n".join(rows)


def _use(config: Mapping[str, Any]) -> str:
    """Return how to load the weights and to adapt them."""
    settings = config["settings"]
    given = {name: settings[name] for name in ("step_size", "num_steps") if name in settings}
    if settings.get("inner_optimizer") in ("sgd", "adam", "adamw"):
        given["inner_optimizer"] = settings["inner_optimizer"]
    arguments = "".join(f", {name}={value!r}" for name, value in given.items())
    learner = config.get("learner", f"koi.Koi(model{arguments})")
    plain = "checkpoint" not in config
    imports = "\nfrom safetensors.torch import load_model" if plain else ""
    load = 'load_model(model, "model.safetensors")\n\n' if plain else ""
    note = (
        "Any training loop can take the place of the last two lines: the file holds plain weights."
        if plain
        else f"""\
{code(config["checkpoint"])} holds the weights and what the inner loop had besides in training,
the optimizer's moments or learned rates; what was measured was adapted from all of it.
`model.safetensors` holds the plain weights, for any training loop; without the rest they adapt a
little differently."""
    )
    # `import koi` alone does not bring koi.models
    door = "koi.models" if "koi.models." in config["model"] else "koi"
    lines = f"""\
import {door}
import torch{imports}

model = {config["model"]}
{load}learner = {learner}
adapted = learner.adapt(task)  # anything with loss(model)"""
    first = "The weights are an initialisation: adapt them to a task before use."
    return "\n\n".join([first, block(lines, "python"), note])


def _training(config: Mapping[str, Any]) -> str:
    algorithm = config["settings"].get("algorithm", "reptile")
    authors, paper = _PAPERS.get(algorithm, _REPTILE)
    of = f"[{authors}](https://arxiv.org/abs/{paper})"
    lines = [f"Meta-learned with Koi by {text(algorithm)} ({of}):", ""]
    lines += ["| setting | value |", "| :-- | :-- |"]
    lines += [f"| {code(name)} | {code(value)} |" for name, value in config["settings"].items()]
    if "command" in config:
        lines += ["", block(config["command"], "bash")]
    if "versions" in config:
        versions = (text(f"{name} {version}") for name, version in config["versions"].items())
        lines += ["", "Versions: " + ", ".join(versions) + "."]
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """Return a float without the digits that only its bits have.

    >>> _rounded(0.8399999999999999), _rounded(3)
    (0.84, 3)
    """
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _data(data: Mapping[str, Any]) -> str:
    name = link(data["name"], data["url"]) if "url" in data else text(data["name"])
    return f"{name}; licence: {text(data['license'])}."


def _plain(value: Any) -> str:
    """Return a value of the head, on one line."""
    return printable(" ".join(str(value).split()))
