from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from boostdiff.engine.errors import InputError
from boostdiff.engine.options import (
    DeviceOption,
    check_not_empty,
    check_options,
    config_from,
    options_of,
    refuse_unused,
)
from typer.testing import CliRunner


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: Annotated[int, typer.Option(help="LoRA rank r.")] = 8
    alpha: Annotated[float | None, typer.Option(show_default="the rank", help="LoRA alpha.")] = None
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file.")] = None
    seed: int = 7


@dataclass(frozen=True, kw_only=True)
class Other:
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20


def make_app(seen: list[Any]) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    @options_of(Config, Other)
    def train(
        device: DeviceOption = "auto", steps: Annotated[int, typer.Option(help="Own.")] = 3, **options: Any
    ) -> None:
        """Train."""
        seen.append((device, steps, Config(**options)))

    return app


def test_a_command_takes_what_its_configs_declare() -> None:
    seen: list[Any] = []
    result = CliRunner().invoke(make_app(seen), ["--rank", "4", "--device", "cpu", "--prompts", "p.txt"])
    assert result.exit_code == 0, result.output
    assert seen == [("cpu", 3, Config(rank=4, prompts=Path("p.txt")))]
    assert CliRunner().invoke(make_app(seen), ["--rank", "four"]).exit_code == 2
    assert CliRunner().invoke(make_app(seen), ["--seed", "1"]).exit_code == 2


def test_help_and_defaults_are_the_fields() -> None:
    text = " ".join(CliRunner().invoke(make_app([]), ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "LoRA rank r. [default: 8]" in text
    assert "[default: (the rank)]" in text
    assert "Own. [default: 3]" in text
    assert "Sampling steps" not in text


@dataclass(frozen=True, kw_only=True)
class Checked:
    method: Annotated[Literal["lora", "bitfit"] | None, typer.Option(help="Adapter.")] = None
    rank: Annotated[int, typer.Option("--lora-rank", min=1, max=8, help="LoRA rank r.")] = 8
    seed: int = 7


def test_what_the_fields_declare_is_checked_in_python_too() -> None:
    check_options(Checked())
    for changes, message in (
        ({"method": "magic"}, "unknown method 'magic': choose one of lora, bitfit"),
        ({"rank": 0}, "--lora-rank must be at least 1"),
        ({"rank": 9}, "--lora-rank must be at most 8"),
    ):
        with pytest.raises(InputError, match=message):
            check_options(Checked(**changes))


def test_an_option_that_would_be_ignored_is_refused() -> None:
    refuse_unused(Checked(method="bitfit"), "with --method bitfit", "rank")
    with pytest.raises(InputError, match="--lora-rank is not used with --method bitfit: leave it out"):
        refuse_unused(Checked(rank=4), "with --method bitfit", "rank")


def test_a_config_takes_its_own_of_a_commands_options() -> None:
    assert config_from(Checked, {"rank": 4, "steps": 3}, seed=1) == Checked(rank=4, seed=1)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--output", ""],
        ["run", "--output="],
        ["run", "--fast", "--images", "", "--output", "x"],
        ["below", "run", "--steps="],
    ],
)
def test_an_empty_value_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"^--(output|images|steps) is empty: pass a value"):
        check_not_empty(_nested(), words)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--negative-prompt", ""],
        ["run", "--negative-prompt=", "--output", "x"],
        # A prompt after a flag, one that ends so, and what follows `--`.
        ["run", "--fast", ""],
        ["run", "1 + 1 ="],
        ["run", "--", "--output="],
        ["run", "--unknown="],
    ],
)
def test_what_may_be_empty(words: list[str]) -> None:
    check_not_empty(_nested(), words)


def _nested() -> typer.Typer:
    app, below = typer.Typer(), typer.Typer()

    @app.command()
    def run(output: Path = Path(), images: str = "x", fast: bool = False, negative_prompt: str = "") -> None:
        """Run."""

    @below.command(name="run")
    def other(steps: int = 1) -> None:
        """Run."""

    @below.callback()
    def nothing() -> None:
        """Below."""

    app.add_typer(below, name="below")
    return app
