"""The containers start what exists: every command is parsed by its real parser, every variable is read by the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
TEXT = (PROJECT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if str(service["image"]).startswith("moelab-")]


def test_it_is_a_compose_file() -> None:
    subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(PROJECT / "docker-compose.yml")], check=True
    )


def test_it_has_the_services() -> None:
    assert set(SERVICES) == {"postgres", "valkey", "migrate", "web", "beat", "worker"}
    [device] = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_of_ours(name: str) -> None:
    program, *arguments = SERVICES[name]["command"]
    if program == "moelab":
        from moelab.cli import build_parser

        assert callable(build_parser().parse_args(arguments).run)
    elif program == "uvicorn":
        import uvicorn

        context = uvicorn.main.make_context("uvicorn", list(arguments))
        assert context.params["app"] == "moelab.asgi:application"
        assert context.params["ws_max_size"] == 5_000_000 and context.params["ws_per_message_deflate"] is False
    else:
        from django.core.management import load_command_class

        script, command, *options = arguments
        assert program == "python" and (PROJECT / script).is_file()
        load_command_class("django.core", command).create_parser(script, command).parse_args(options)


def test_the_web_server_is_started_as_on_one_machine() -> None:
    """The limits of sockets and bodies are the same under `moelab up`."""
    stack = (PROJECT / "moelab" / "stack.py").read_text()
    for option in SERVICES["web"]["command"][2:]:
        name = option.split("=")[0]
        assert f'"{name}"' in stack, name


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_read_by_the_code(name: str) -> None:
    code = "\n".join(path.read_text() for part in ("moelab", "workers") for path in (PROJECT / part).rglob("*.py"))
    for variable in SERVICES[name]["environment"]:
        assert re.search(rf"""["']{variable}["']""", code), variable


def test_secrets_have_no_defaults_and_nothing_listens_outside() -> None:
    for secret in ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "MOELAB_SECRET_KEY"):
        uses = re.findall(r"\$\{" + secret + r"([^}]*)\}", TEXT)
        assert uses and all(use.startswith(":?") for use in uses), secret
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8000:8000"]


@pytest.mark.parametrize("name", ["postgres", "valkey", "web"])
def test_what_others_wait_for_says_whether_it_is_well(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    waiting = [service["depends_on"][name] for service in SERVICES.values() if name in service.get("depends_on", {})]
    assert waiting and all(condition == {"condition": "service_healthy"} for condition in waiting)


def test_the_health_check_is_python_and_asks_what_exists() -> None:
    *_, code = SERVICES["web"]["healthcheck"]["test"]
    compile(code, "healthcheck", "exec")
    from experiments.health import urlpatterns

    assert re.search(r"127\.0\.0\.1:8000/(\w+)", code)[1] in {str(pattern.pattern) for pattern in urlpatterns}  # type: ignore[index]


def test_volumes_are_declared_and_home_lies_on_one() -> None:
    mounts = {name: dict(mount.split(":", 1) for mount in service.get("volumes", [])) for name, service in SERVICES.items()}
    assert {volume for used in mounts.values() for volume in used} == set(COMPOSE["volumes"])
    for name in OURS:
        assert SERVICES[name]["environment"]["MOELAB_HOME"] in mounts[name].values()


def test_the_images_are_built_from_what_is_in_the_repository() -> None:
    dockerfile = (PROJECT / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", dockerfile, flags=re.MULTILINE))
    assert {service["build"]["target"] for service in SERVICES.values() if "build" in service} <= stages
    allowed = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (PROJECT / source).exists(), source
            assert source.split("/")[0] in allowed, source


@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="docker compose is not here",
)
def test_docker_takes_it() -> None:
    environment = {"POSTGRES_PASSWORD": "a", "VALKEY_PASSWORD": "b", "MOELAB_SECRET_KEY": "c" * 32, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    subprocess.run(["docker", "compose", "--file", str(PROJECT / "docker-compose.yml"), "config", "--quiet"], env=environment, check=True)
