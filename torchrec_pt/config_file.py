"""The TOML file of a run, read; what is wrong in it as one line."""

from __future__ import annotations

import copy
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from torchrec_pt.config import RunConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A configuration the user can mend; the message is one line."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `a.b=value` overrides (values in TOML, bare words as strings).

    Relative paths are taken from the current directory.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown key, bad value or bad override.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(raw, override)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, RunConfig)}") from None
    try:
        _check_space(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A configuration that was read before, with `a.b=value` overrides of `load_config`.

    Raises:
        ConfigError: unknown key, bad value or bad override.
    """
    raw = config.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        _apply_override(raw, override)
    return resolved(raw)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f'--set {override}: want key.path=value, such as "pretrain.epochs=3"')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    try:
        _set(raw, keys, value)
    except ConfigError as error:
        raise ConfigError(f"--set {override}: {error}") from None


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Other values for some dotted keys (list elements by index, as in --set), and no `tune`.

    Raises:
        ConfigError: an unknown key, or a value that does not fit it or the others.
    """
    # What the user wrote, not what it was completed to: other values may bring other defaults.
    raw = config.model_dump(mode="json", exclude_unset=True, exclude={"tune"})
    for key, value in values.items():
        try:
            _set(raw, key.split("."), copy.deepcopy(value))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, RunConfig)) from None


def resolved(raw: Mapping[str, Any]) -> RunConfig:
    """A configuration as `RunConfig.model_dump` gives it.

    Raises:
        ConfigError: it is of another version of torchrec_pt, or was changed.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, RunConfig)) from None


def _check_space(config: RunConfig) -> None:
    """Each value that a search may try fits its key, the rest being as it stands."""
    if config.tune is None:
        return
    task = config.tune.task
    configured = {"pretrain": config.pretrain, **config.finetune.tasks}
    if configured.get(task) is None:
        section = task if task == "pretrain" else f"finetune.{task}"
        raise ConfigError(f'tune.task: "{task}" is not configured; add [{section}]')
    for key, domain in config.tune.space.items():
        for value in domain.examples:
            try:
                with_values(config, {key: value})
            except ConfigError as error:
                raise ConfigError(f"tune.space: {error}") from None


def _set(raw: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    node: Any = raw
    for depth, key in enumerate(keys):
        step: Any = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f'"{key}" is no index of a list of {len(node)}')
            step = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f'"{keys[depth - 1]}" has no keys below it')
        if depth == len(keys) - 1:
            node[step] = value
        else:
            node = node[step] if isinstance(node, list) else node.setdefault(key, {})


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a validation error as one line: where, what, how to mend."""
    errors = error.errors()
    # A list whose element is wrong is reported as too short besides.
    problems = [
        one
        for one in errors
        if not any(o["loc"][: len(one["loc"])] == one["loc"] != o["loc"] for o in errors)
    ]
    first = problems[0]
    location, kind = first["loc"], first["type"]
    # A union puts the chosen tag into the location: finetune.ranking, objectives.0.masked_item.
    model, where = _walk(root, location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if kind == "extra_forbidden":
        key = str(location[-1])
        near = difflib.get_close_matches(key, model.model_fields if model else (), n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {_listed(model)}"
        return f"{where}: unknown key; {hint}{more}"
    if kind in ("union_tag_invalid", "literal_error"):
        given = first["ctx"].get("tag", first["input"])
        expected = first["ctx"].get("expected_tags", first["ctx"].get("expected", ""))
        options = [option.strip(" '\"") for option in expected.replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"choose one of {', '.join(options)}"
        return f'{where}: unknown value "{given}"; {hint}{more}'
    if kind == "missing":
        return f"{where}: required, but missing; add it{more}"
    if kind == "union_tag_not_found":
        return f"{where}: lacks {first['ctx']['discriminator']}, which says what it is{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f", given {first['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{given}{more}"


def _listed(model: type[BaseModel] | None) -> str:
    return ", ".join(model.model_fields) if model else "none"


def _walk(
    root: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[type[BaseModel] | None, str]:
    """The innermost model on the way to `location`, and the location as a TOML user writes it."""
    model: type[BaseModel] | None = root
    candidates: tuple[type[BaseModel], ...] = (root,)
    words: list[str] = []
    for part in location:
        if isinstance(part, int):
            words[-1] += f"[{part}]"
            continue
        tagged = [c for c in candidates if len(candidates) > 1 and _tag(c) == part]
        if tagged:
            model, candidates = tagged[0], (tagged[0],)
            continue
        words.append(part)
        model = candidates[0] if len(candidates) == 1 else model
        if model and part in model.model_fields:
            candidates = _models_in(model.model_fields[part].annotation)
    return model, ".".join(words) or "top level"


def _tag(model: type[BaseModel]) -> str | None:
    for key in ("name", "rule", "backbone"):
        if key in model.model_fields:
            return str(typing.get_args(model.model_fields[key].annotation)[0])
    return None


def _models_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
        return tuple(m for inner in typing.get_args(annotation) for m in _models_in(inner))
    return ()
