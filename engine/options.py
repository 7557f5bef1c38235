"""Options of the commands: those that they share, and those that a config declares.

An option is written once. What a config holds, its field declares: `rank: Annotated[int, typer.Option(help="…")] = 8`
gives name, type, help and default; `options_of(Config)` makes a command take it. Nothing here imports torch: the help
of a command must not wait for it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

ModelOption = Annotated[
    str, typer.Option("--model", help="The embedded model [bold]emoji64[/], a diffusers folder or a hub id.")
]
StudentOption = Annotated[Path, typer.Option("--student", help="Folder that `boostdiff distill` wrote.")]
EngineOption = Annotated[Path, typer.Option("--engine", help="Folder that `boostdiff export` wrote.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder to write.")]
SamplerOption = Annotated[str, typer.Option("--sampler", help="ddim, dpm++, unipc or euler.")]
StepsOption = Annotated[int, typer.Option("--steps", help="Sampling steps.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]

Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(*configs: type) -> Callable[[Command], Command]:
    """Give a command the declared fields of configs as options, in place of its `**options`.

    The command's own parameters keep their place and win over fields of the same name. What is passed in `options` has
    the fields' names, so `Config(**options)` takes it.

    Args:
        configs: dataclasses; of each, the fields whose annotation holds a `typer.Option` are taken, in their order.

    Raises:
        TypeError: the command has no `**options`, or two configs declare one name.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = list(signature.parameters.values())
        if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"{command.__name__} takes no **options")
        own = {parameter.name: parameter for parameter in parameters[:-1]}
        declared: dict[str, inspect.Parameter] = {}
        for config in configs:
            hints = get_type_hints(config, include_extras=True)
            for field in dataclasses.fields(config):
                if field.name in own or not _is_option(hints[field.name]):
                    continue
                if field.name in declared:
                    raise TypeError(f"{field.name} is declared twice")
                declared[field.name] = inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=_default(field),
                    annotation=hints[field.name],
                )
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own.values()]
            + list(declared.values())
        )
        return command

    return decorate


def _is_option(hint: Any) -> bool:
    return get_origin(hint) is Annotated and any(isinstance(extra, OptionInfo) for extra in get_args(hint)[1:])


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
