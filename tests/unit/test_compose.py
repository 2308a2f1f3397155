"""compose.yaml, the image and the systemd units keep what docs/operations.md promises; no Docker needed."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from config.celery import celery_config
from config.heartbeat import BEAT_SILENCE, EXPORTER_SILENCE, WORKER_SILENCE
from config.settings import Settings
from tasks.exporter import DEFAULT_PORT

ROOT = Path(__file__).parents[2]
yaml: Any = pytest.importorskip("yaml", reason="PyYAML reads compose.yaml; it is in the group `dev`")

TEXT = (ROOT / "compose.yaml").read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("migrate", "worker", "beat", "flower", "exporter")
# Ends by itself, so there is nothing to keep healthy.
ONE_SHOT = "migrate"
UNITS = sorted((ROOT / "config/systemd").glob("*.service"))

every_service = pytest.mark.parametrize("name", SERVICES)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()  # type: ignore[union-attr]  # a failure either way
    return float(number) * {"s": 1, "m": 60}[unit]


def settings_variables() -> set[str]:
    return {f"TIDEMARK_{name}".upper() for name in Settings.model_fields}


@every_service
def test_every_service_is_restarted_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == ("on-failure:5" if name == ONE_SHOT else "unless-stopped")
    assert ("healthcheck" in service) == (name != ONE_SHOT)


@every_service
def test_no_service_may_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert "privileged" not in service
    assert "cap_add" not in service
    # The others' images name a user of their own: ours 10001, Prometheus 65534, Grafana 472.
    assert service.get("user") == {"postgres": "postgres", "redis": "redis"}.get(name)
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["pids"]
    assert service["logging"]["options"]["max-size"]


@every_service
def test_ports_are_published_on_the_loopback_address_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:"), port


@every_service
def test_images_are_pinned(name: str) -> None:
    image = SERVICES[name]["image"]
    match = re.fullmatch(r"\$\{[A-Z]+_IMAGE:-([a-z/]+):([\w.-]+)\}", image)
    assert match, image
    assert match[2] != "latest"


def test_the_container_tests_use_the_same_images() -> None:
    tests = (ROOT / "tests/docker/conftest.py").read_text("utf-8")
    for service in ("postgres", "redis"):
        default = re.findall(rf'get\("{service.upper()}_IMAGE", "(.+)"\)', tests)
        assert [SERVICES[service]["image"]] == [f"${{{service.upper()}_IMAGE:-{image}}}" for image in default]


def test_secrets_have_no_default() -> None:
    """Every variable that holds a secret stops compose when it is missing; the example has no value for one."""
    example = (ROOT / ".env.example").read_text("utf-8")
    secrets = set(re.findall(r"\$\{(\w*(?:PASSWORD|AUTH|SECRET)\w*)", TEXT))
    assert secrets == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "TIDEMARK_FLOWER_AUTH", "GRAFANA_PASSWORD"}
    for name in secrets:
        uses = re.findall(rf"\$\{{{name}(.*?)\}}", TEXT)
        assert uses
        assert all(use.startswith(":?") for use in uses), name
        assert f"\n{name}=\n" in example


def test_every_variable_is_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text("utf-8")
    for name in set(re.findall(r"\$\{(\w+)", TEXT)):
        assert re.search(rf"^#?{name}=", example, re.MULTILINE), name


@pytest.mark.parametrize("name", OURS)
def test_settings_pass_through(name: str) -> None:
    """A setting of Tidemark's that compose does not pass on would be ignored; one that does not exist, too."""
    given = {v for v in SERVICES[name]["environment"] if v.startswith("TIDEMARK_")}
    # Each container has one program, in a file system of its own.
    inside = {"TIDEMARK_DATA_DIR", "TIDEMARK_HEARTBEAT_FILE"}
    flower = {"TIDEMARK_FLOWER_AUTH"}
    assert given == settings_variables() - inside - (set() if name == "flower" else flower)


@pytest.mark.parametrize("file", [".env.example", "config/Dockerfile", *UNITS], ids=lambda f: Path(f).name)
def test_variables_exist(file: str | Path) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert set(re.findall(r"\b(TIDEMARK_[A-Z_]+)\b", text)) <= settings_variables()


def test_nobody_starts_before_the_schema_is_there() -> None:
    for name in set(OURS) - {ONE_SHOT}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert SERVICES[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert SERVICES[ONE_SHOT]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_stopping_leaves_time_for_the_soft_shutdown() -> None:
    soft = celery_config(Settings(), "redis://redis", "redis://redis")["worker_soft_shutdown_timeout"]
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= soft + 15
    unit = (ROOT / "config/systemd/tidemark-worker@.service").read_text("utf-8")
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) >= soft + 15
    for text in (unit, (ROOT / "config/Dockerfile").read_text("utf-8")):
        assert "REMAP_SIGTERM=SIGQUIT" in text


def test_the_probes_look_at_the_heartbeats_as_long_as_they_count() -> None:
    for name, silence in (("worker", WORKER_SILENCE), ("beat", BEAT_SILENCE), ("exporter", EXPORTER_SILENCE)):
        (_, command) = SERVICES[name]["healthcheck"]["test"]
        assert command == f"find /var/lib/tidemark/{name}.heartbeat -newermt '-{silence:.0f} seconds' | grep -q ."


def test_prometheus_scrapes_the_exporter() -> None:
    scraped = yaml.safe_load((ROOT / "config/prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert [c["targets"] for job in scraped for c in job["static_configs"]] == [[f"exporter:{DEFAULT_PORT}"]]


def test_mounted_files_exist() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume


def test_every_runbook_is_a_section_of_the_operations_page() -> None:
    alerts = (ROOT / "config/prometheus/alerts.yml").read_text("utf-8")
    page = (ROOT / "docs/operations.md").read_text("utf-8")
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    }
    anchors = set(re.findall(r"operations\.md#([\w-]+)", alerts))
    assert anchors
    assert anchors <= headings


def test_everything_the_programs_read_is_in_the_wheel() -> None:
    """The image installs a wheel: a data file that no pattern names is missing there, and nowhere else."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    for package in ("db", "tasks"):
        data = [
            str(file.relative_to(ROOT / package))
            for file in (ROOT / package).rglob("*")
            if file.is_file() and file.suffix not in {".py", ".pyc"}
        ]
        wanted = [pattern.replace("**/*", "*") for pattern in patterns.get(package, [])]
        missing = [file for file in data if not any(fnmatch(file, pattern) for pattern in wanted)]
        assert missing == [], f"add them to tool.setuptools.package-data.{package}"
