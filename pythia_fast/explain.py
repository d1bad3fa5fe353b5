"""Which switches a page sets, what the recipes say, and how the run differs from the published one.

`pythia-fast train CONFIG --explain` prints it and trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pythia_fast.config import Config, describe_keys, flatten, resolve
from pythia_fast.recipe import RECIPES, SWITCHES, switches, unverified
from pythia_fast.values import toml_value

_COMPARED = (
    *("model.", "optimizer.", "precision.", "data.order", "data.seq_len"),
    *("train.steps", "train.batch_size", "train.micro_batch_size", "train.seed"),
)


def published(preset: str) -> dict[str, Any]:
    """Dotted key -> value of the published run of a model: its size under "pythia-v1"."""
    return flatten(resolve({"model.preset": preset, "recipe": "pythia-v1"}))


def differing(config: Config) -> dict[str, tuple[Any, Any]]:
    """Key -> (here, published) of what decides the losses and differs; empty without a preset."""
    if not config.model.preset:
        return {}
    ours, theirs = flatten(config), published(config.model.preset)
    if config.data.order == "preshuffled":  # the original's order, already applied to the files
        ours["data.order"] = theirs["data.order"]
    return {
        key: (ours[key], theirs[key])
        for key in config.decisive
        if key.startswith(_COMPARED) and ours[key] != theirs[key]
    }


def differences(config: Config) -> list[str]:
    """How a run differs from the published run of its preset, a line a key."""
    return [
        f"{key} = {toml_value(here)} (published: {toml_value(there)})"
        for key, (here, there) in differing(config).items()
    ]


def explain(config: Config) -> Iterator[dict[str, Any]]:
    """One object a switch, then one a key beside them that differs or whose original is not known.

    "switch": the key; "value": in this run; "pythia-v1", "modern": in the recipes, for this run's
    preset; "published": in the published run, null without a preset; "differs": from it;
    "unverified": why the published value is not known for sure, or null; "what", "reason",
    "source": one line each. Other keys have no recipe, reason or source.
    """
    ours, preset = flatten(config), config.model.preset
    theirs = published(preset) if preset else {}
    recipes = {name: switches(name, preset) for name in RECIPES}
    docs = {key: doc for key, _, doc in describe_keys()}
    differ, open_questions = differing(config), unverified(preset)
    rest = (differ.keys() | open_questions) - {s.key for s in SWITCHES}
    for s in SWITCHES:
        yield {
            "switch": s.key,
            "value": ours[s.key],
            **{name: values.get(s.key, ours[s.key]) for name, values in recipes.items()},
            "published": theirs.get(s.key),
            "differs": s.key in differ,
            "unverified": open_questions.get(s.key),
            "what": docs[s.key],
            "reason": s.reason,
            "source": s.source,
        }
    for key in (k for k in ours if k in rest):
        row = {"switch": key, "value": ours[key], "published": theirs[key]}
        row |= {"differs": key in differ, "unverified": open_questions.get(key)}
        yield row | {"what": docs[key]}


def as_text(config: Config) -> str:
    """`explain` as a page for people."""
    named = f"recipe = {toml_value(config.recipe)}" if config.recipe else "no recipe"
    of = f", preset {config.model.preset}" if config.model.preset else ", no preset"
    lines = [f"{named}{of}", "", f"{'switch':31}{'this run':>12}{'pythia-v1':>13}{'modern':>13}"]
    for row in explain(config):
        if "reason" in row:
            values = (_plain(row[k]) for k in ("value", *RECIPES))
            here, v1, modern = values
            lines += [
                f"{row['switch']:31}{here:>12}{v1:>13}{modern:>13}",
                f"    {row['reason']} [{row['source']}]",
            ]
    lines.append("")
    theirs = published(config.model.preset) if config.model.preset else {}
    if not config.model.preset:
        lines.append("no preset: there is no published run to compare with")
    elif found := differences(config):
        lines.append(f"differs from the published {config.model.preset}:")
        lines += [f"    {line}" for line in found]
    elif unverified(config.model.preset):
        lines.append(f"no key differs from what is known of the published {config.model.preset}")
    else:
        lines.append(f"every key is that of the published {config.model.preset}")
    for key, reason in unverified(config.model.preset).items():
        lines.append(f"unverified: {key} = {toml_value(theirs[key])}: {reason}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else toml_value(value)
