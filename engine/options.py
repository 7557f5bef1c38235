"""Options of the commands: those that they share, and those that a config declares.

An option is written once. What a config holds, its field declares: `rank: Annotated[int, typer.Option(help="…")] = 8`
gives name, type, help and default; `options_of(Config)` makes a command take it. Nothing here imports torch: the help
of a command must not wait for it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from .errors import InputError

UNRESOLVED: Any = None
"""Default of an option whose value depends on others: one function fills it in, `show_default` says with what."""

ModelOption = Annotated[
    str, typer.Option("--model", help="The embedded model [bold]emoji64[/], a diffusers folder or a hub id.")
]
STUDENT_FOLDER, ENGINE_FOLDER = Path("outputs/student"), Path("outputs/engine")
"""Where `distill` and `export` write, and what comes after them reads, unless told otherwise."""
StudentOption = Annotated[Path, typer.Option("--student", help="Folder that `boostdiff distill` wrote.")]
EngineOption = Annotated[Path, typer.Option("--engine", help="Folder that `boostdiff export` wrote.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder to write.")]
SamplerOption = Annotated[Literal["ddim", "dpm++", "unipc", "euler"], typer.Option("--sampler", help="Sampler.")]
STEPS, SAMPLER = 20, "ddim"
"""Where neither the user nor a few-step student says."""
StudentsSamplerOption = Annotated[
    Literal["ddim", "dpm++", "unipc", "euler"] | None,
    typer.Option("--sampler", show_default=f"{SAMPLER}; a few-step student's own", help="Sampler."),
]
StudentsStepsOption = Annotated[
    int | None,
    typer.Option("--steps", min=1, show_default=f"{STEPS}; a few-step student's own", help="Sampling steps."),
]
SpacingOption = Annotated[
    Literal["leading", "trailing"] | None,
    typer.Option(
        "--timestep-spacing",
        show_default="the model's; a few-step student's own",
        help="Spacing of the timesteps: trailing starts at the last one, which matters in few steps.",
    ),
]
# The number of an image, and bench's distance to other seeds, are added to it within 64 bits.
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (the GPU if there is one), cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
MaxAutotuneOption = Annotated[
    bool,
    typer.Option(
        "--max-autotune",
        help="torch.compile times several forms of each matrix product: minutes more to start, and faster passes on "
        "CPUs with AMX. On a GPU it always does.",
    ),
]

Command = TypeVar("Command", bound=Callable[..., Any])
Config = TypeVar("Config")


def options_of(*configs: type) -> Callable[[Command], Command]:
    """Give a command the declared fields of configs as options, in place of its `**options`.

    The command's parameters keep their place and win over fields of the same name. What is passed in `options` has
    the fields' names, so `Config(**options)` takes it.

    `configs` are dataclasses; of each, the fields whose annotation holds a `typer.Option` are taken, in their order.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = list(signature.parameters.values())
        taken = {parameter.name: parameter for parameter in parameters[:-1]}
        declared: dict[str, inspect.Parameter] = {}
        for config in configs:
            hints = get_type_hints(config, include_extras=True)
            for field in dataclasses.fields(config):
                if field.name in taken or _option(hints[field.name]) is None:
                    continue
                declared[field.name] = inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=_default(field),
                    annotation=hints[field.name],
                )
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in taken.values()]
            + list(declared.values())
        )
        return command

    return decorate


def config_from(config: type[Config], options: dict[str, Any], **more: Any) -> Config:
    """A config of those of a command's options that it declares, and of `more`."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(**{name: value for name, value in options.items() if name in names} | more)


def config_as_json(config: Any, *left_out: str) -> dict[str, Any]:
    """A config's fields, but for some, as plain JSON values."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name not in left_out
    }


def check_options(config: Any) -> None:
    """Check a config's fields against what they declare: choices, minimum and maximum; and the size of whole numbers.

    Raises:
        InputError: a value is none of its choices, or out of bounds.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if isinstance(value, str):
            check_text(value)
        if value is None or (option := _option(hint)) is None:
            continue
        if (choices := _choices(hint)) and value not in choices:
            raise InputError(f"unknown {name.replace('_', ' ')} {value!r}: choose one of {', '.join(choices)}")
        if option.min is not None and not value >= option.min:
            raise InputError(f"{_flag(name, option)} must be at least {option.min}")
        if option.max is not None and not value <= option.max:
            raise InputError(f"{_flag(name, option)} must be at most {option.max}")
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(number, int) and number >= 2**63 for number in numbers):
            raise InputError(f"{_flag(name, option)} is too large: no number here has more than 63 bits")


MAY_BE_EMPTY = {"--negative-prompt"}
"""Options whose empty value says something."""


def check_not_empty(app: typer.Typer, words: Sequence[str]) -> None:
    """Refuse an option's empty value, as of a shell variable that isn't set: of a path it would be this folder.

    `words` is the command line.

    Raises:
        InputError: one is empty.
    """
    words = words[: words.index("--")] if "--" in words else words
    if not any(word == "" or word.endswith("=") for word in words):
        return
    takes_value = set(_options_with_values(typer.main.get_command(app))) - MAY_BE_EMPTY
    for before, word in zip(["", *words], words, strict=False):
        name = word[:-1] if word.endswith("=") else before if word == "" else ""
        if name in takes_value:
            raise InputError(f"{name} is empty: pass a value, or leave it out")


def _options_with_values(command: Any) -> Iterator[str]:
    """Names of the options of a command and of its subcommands that are no flags."""
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.is_flag:
            yield from parameter.opts
    for below in getattr(command, "commands", {}).values():
        yield from _options_with_values(below)


def check_text(text: str) -> None:
    """Refuse what the command line holds of another encoding.

    Raises:
        InputError: it is no UTF-8 text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!r} is not UTF-8 text: pass it in the encoding of your locale") from None


def refuse_unused(config: Any, why: str, *names: str) -> None:
    """Refuse options that would be ignored: of the fields called `names`, those that don't have their defaults.

    `why` says when they are ignored, to follow "is not used".

    Raises:
        InputError: one of them was asked for.
    """
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != _default(field):
            option = _option(get_type_hints(type(config), include_extras=True)[field.name]) or OptionInfo()
            raise InputError(f"{_flag(field.name, option)} is not used {why}: leave it out")


def _option(hint: Any) -> OptionInfo | None:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, OptionInfo)), None)


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, optional or not."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for inner in get_args(hint) if (found := _choices(inner))), ())


def _flag(name: str, option: OptionInfo) -> str:
    """An option as the user writes it."""
    # Within `Annotated` typer's first argument, `default`, is a name, too.
    names = [str(each) for each in (option.default, *(option.param_decls or ())) if str(each).startswith("--")]
    return names[0] if names else f"--{name.replace('_', '-')}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
