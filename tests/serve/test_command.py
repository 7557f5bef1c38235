"""What `boostdiff serve` refuses before Ray starts, and the configurations in the repository."""

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.serve import command
from boostdiff.serve.config import ServeConfig, read_config
from boostdiff.serve.loading import name_of
from boostdiff.serve.settings import KEY_VARIABLE, ModelSettings, api_key, is_loopback, parse_settings

EXAMPLES = Path(__file__).parents[2] / "docs/serving"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ray is installed: none of these tests comes as far as importing it."""
    monkeypatch.setattr(command, "is_installed", lambda name: True)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_the_examples_are_read() -> None:
    for name in ("serve.yaml", "cluster.yaml"):
        args, host, port = read_config(yaml.safe_load((EXAMPLES / name).read_text()), EXAMPLES / name)
        assert port == 8000
        settings = parse_settings(args)
        assert is_loopback(host) == (name == "serve.yaml")
    assert settings.models[0].deployment["ray_actor_options"] == {"num_gpus": 1}
    kuberay = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    args, *_ = read_config(yaml.safe_load(kuberay["spec"]["serveConfigV2"]), EXAMPLES / "kuberay.yaml")
    assert parse_settings(args).models[0].name == "sdxl"


def test_options_make_the_settings() -> None:
    config = ServeConfig(
        engine=Path("/engines/a"), teacher=True, model="emoji64", replicas=2, max_steps=30, public_url="https://a.org/"
    )
    settings = parse_settings(config.settings(deployment={"ray_actor_options": {"num_cpus": 1}}))
    engine, teacher = settings.models
    assert (engine.engine, engine.runner) == ("/engines/a", "auto")
    assert (teacher.engine, teacher.student, name_of(teacher)) == (None, None, "emoji64-teacher")
    assert engine.deployment == {"ray_actor_options": {"num_cpus": 1}, "num_replicas": 2}
    assert (settings.limits.steps, settings.public_url) == (30, "https://a.org")
    config = ServeConfig(student=Path("/s"), teacher=True, runner="compiled")
    in_torch = parse_settings(config.settings(deployment={})).models
    assert [(each.student, each.runner) for each in in_torch] == [("/s", "compiled"), (None, "compiled")]
    assert parse_settings(ServeConfig(teacher=True, runner="onnx").settings(deployment={})).models[1].runner == "auto"


@pytest.mark.parametrize(
    ("model", "expected"), [("m", "{here}/m"), ("m/../m", "{here}/m"), ("emoji64", "emoji64"), ("org/name", "org/name")]
)
def test_a_models_folder_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, expected: str
) -> None:
    """Replicas run in other folders; a hub id, and the embedded model beside a folder of its name, are no folders."""
    for folder in ("m", "emoji64"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    (teacher,) = [
        each
        for each in parse_settings(ServeConfig(student=Path("s"), model=model).settings(deployment={})).models
        if each.student
    ]
    assert teacher.model == expected.format(here=tmp_path)


def test_a_name_has_no_folders(students: dict[str, Path], tiny_folder: Path) -> None:
    settings = ModelSettings(student=str(students["lora"]), model=f"{tiny_folder}/")
    assert name_of(settings) == tiny_folder.name
    with pytest.raises(InputError, match="there is no engine"):
        name_of(ModelSettings(engine="/nowhere"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, f"set {KEY_VARIABLE}"),  # noqa: S104
        ({"host": "example.org"}, f"set {KEY_VARIABLE}"),
        ({"engine": Path("/nowhere")}, "there is no engine in /nowhere"),
        ({"student": Path("/nowhere")}, "there is no student in /nowhere"),
        ({"student": Path("s"), "runner": "onnx"}, "--runner onnx runs engines: pass torch, captured or compiled"),
        ({"runner": "captured"}, "--runner captured runs students in torch: pass --student"),
        ({"engine": Path("e"), "runner": "compiled"}, "--runner compiled runs students in torch"),
        ({"student": Path("s"), "precision": "fp16"}, "--precision is not used with --student"),
        ({"model": "emoji64"}, "--model is not used"),
        ({"config": Path("a.yaml"), "port": 9}, "--port is not used with --config"),
        ({"config": Path("a.yaml")}, r"can't read a\.yaml"),
        ({"port": 0}, "--port must be at least 1"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_can_not_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        command.serve(**vars(ServeConfig()) | options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runner": "tensorrt"}, "exported without --trt"),
        ({"precision": "fp16"}, "has the unet in fp32 alone"),
        ({"runner": "onnx", "precision": "fp16"}, "has the unet in fp32 alone"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_was_not_exported(engines: dict[str, Path], options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        command.serve(**vars(ServeConfig()) | {"engine": engines["bitfit"]} | options)


@pytest.mark.usefixtures("installed")
def test_a_port_that_is_taken(students: dict[str, Path], tiny_folder: Path) -> None:
    options = vars(ServeConfig()) | {"student": students["lora"], "model": str(tiny_folder)}
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(InputError, match="can't listen on"):
            command.serve(**options | {"port": held.getsockname()[1]})


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "is_installed", lambda name: False)
    with pytest.raises(BoostDiffError, match=r"pip install -e '\.\[serve\]'"):
        command.serve(**vars(ServeConfig()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"applications": []}, "no configuration of Ray Serve with one application"),
        ({"applications": [{"import_path": "other:app", "args": {}}]}, "of import_path boostdiff"),
        ({"proxy_location": "HeadOnly"}, "proxy_location, which is not read here"),
        ({1: 2, "x": 3}, "has 1, x, which is not read here"),
        ({"http_options": {1: 2}}, r"http_options\.1, which is not read here"),
        ({"http_options": {"root_path": "/x"}}, r"http_options\.root_path, which is not read here"),
        ({"http_options": {"port": "80"}}, "pass a host and a port"),
    ],
)
def test_configurations_that_can_not_be_used(change: dict[str, Any], said: str) -> None:
    values = yaml.safe_load((EXAMPLES / "serve.yaml").read_text())
    with pytest.raises(InputError, match=said):
        read_config(values | change, Path("x.yaml"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"models": []}, "models"),
        ({"models": [{"engine": "e", "student": "s"}]}, "leave student and model out"),
        ({"models": [{"engine": "e", "speed": 2}]}, r"models\.0\.speed"),
        ({"models": [{"name": "../x y"}]}, r"models\.0\.name"),
        ({"models": [{}], "limits": {"steps": 0}}, r"limits\.steps"),
        ({"models": [{}], "api_replicas": 2}, "api_replicas above 1 need a storage"),
        *(
            ({"models": [{}], "public_url": url}, "public_url: .*pass a URL such as https://")
            for url in (
                "images.example.org",
                "ftp://a",
                "https://",
                "https://a:x",
                "https://u:p@a",
                "https://a/?b",
                "//a",
            )
        ),
        ([], "settings can't be used"),
    ],
)
def test_settings_that_can_not_be_used(args: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_settings(args)


def test_a_key_is_needed_where_others_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert api_key(loopback=True) is None
    with pytest.raises(InputError, match=KEY_VARIABLE):
        api_key(loopback=False)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert api_key(loopback=False) == api_key(loopback=True) == "secret"
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.1")] == [  # noqa: S104
        True,
        True,
        True,
        False,
        False,
    ]
