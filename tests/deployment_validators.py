"""Each file of deploy/ is read by the program that it is for, or by that program's own checker.

Programs of Python come from ``make test-deploy``'s environment, the others from Debian's packages:
``apt-get install prometheus systemd docker-compose``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["validate"]

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
_MONITORING = DEPLOY / "monitoring"
_YAML_RULES = "{extends: default, rules: {line-length: {max: 100}}}"
_PACKAGES = {
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
    "docker-compose": "docker-compose",
}
_MOST_EXPOSURE = 20
"""Of the unit, in tenths of what systemd-analyze says; a unit without restrictions has 96."""


def validate() -> None:
    """Runs the validators. Raises RuntimeError or CalledProcessError if one finds something."""
    missing = [_PACKAGES[name] for name in _PACKAGES if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"programs are missing: apt-get install {' '.join(missing)}")
    _check_yaml_and_scripts()
    _check_kubernetes()
    _check_unit(DEPLOY / "tokasaurus.service")
    _check_compose()
    _check_prometheus()
    _check_with_model("the dashboard, by Grafana's SDK", _dashboard())
    _check_with_model("kubernetes-monitoring.yaml, by the operator's models", _service_monitor())


def _check_yaml_and_scripts() -> None:
    files = [*sorted(DEPLOY.rglob("*.yaml")), ROOT / "tests/alert_rules.yaml"]
    _run("yamllint", "--strict", "-d", _YAML_RULES, *map(str, files))
    _run("shellcheck", *map(str, DEPLOY.glob("*.sh")), str(ROOT / "tests/systemd/begin.sh"))
    _run("hadolint", "--failure-threshold", "info", str(ROOT / "Dockerfile"))


def _check_kubernetes() -> None:
    """Kinds of Kubernetes itself. Of those of KubeRay, the pods are checked, as Pods."""
    files = [str(DEPLOY / name) for name in ("kubernetes.yaml", "kuberay.yaml")]
    with tempfile.TemporaryDirectory() as directory:
        for number, pod in enumerate(_pods_of_ray(DEPLOY / "kuberay.yaml")):
            files.append(f"{directory}/kuberay-pod-{number}.yaml")
            Path(files[-1]).write_text(yaml.safe_dump(pod))
        _run("kubernetes-validate", "--strict", *files)


def _pods_of_ray(path: Path) -> Iterator[dict[str, Any]]:
    """The pods of a RayJob's cluster."""
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                template = group["template"]
                name = template["spec"]["containers"][0]["name"]
                metadata = {"name": name, **template["metadata"]}
                yield {**template, "apiVersion": "v1", "kind": "Pod", "metadata": metadata}


def _check_unit(unit: Path) -> None:
    """The program of the unit stands in for one that is there: this Python."""
    text = unit.read_text()
    program = "/opt/tokasaurus/bin/toka"
    if f"ExecStart={program} " not in text:
        raise RuntimeError(f"{unit.name} does not start {program}")
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, unit.name)
        copy.write_text(text.replace(program, sys.executable))
        # It prints what it does not know, and succeeds all the same.
        said = _run("systemd-analyze", "verify", "--man=no", str(copy))
        if said:
            raise RuntimeError(f"{unit.name}: {said}")
        most = f"--threshold={_MOST_EXPOSURE}"
        _run("systemd-analyze", "security", "--offline=true", "--no-pager", most, str(copy))


def _check_compose() -> None:
    files = ["-f", str(DEPLOY / "compose.yaml")]
    for more in ([], ["-f", str(DEPLOY / "compose.cuda.yaml")]):
        _run("docker-compose", *files, *more, "config", "--quiet")


def _check_prometheus() -> None:
    """The key is in another place here."""
    with tempfile.TemporaryDirectory() as directory:
        for path in _MONITORING.glob("*.yaml"):
            shutil.copy(path, directory)
        key, config = Path(directory, "key"), Path(directory, "prometheus.yaml")
        key.write_text("key")
        config.write_text(config.read_text().replace("/run/secrets/api_key", str(key)))
        _run("promtool", "check", "config", "--lint=all", "--lint-fatal", str(config))
    _run("promtool", "check", "rules", "--lint=all", "--lint-fatal", f"{_MONITORING}/alerts.yaml")
    _run("promtool", "test", "rules", str(ROOT / "tests/alert_rules.yaml"))


def _dashboard() -> tuple[Any, Any]:
    """The dashboard as it is written, and as Grafana's own classes have read it."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    written = json.loads((_MONITORING / "dashboard.json").read_text())
    return written, json.loads(JSONEncoder().encode(Dashboard.from_json(written)))


def _service_monitor() -> tuple[Any, Any]:
    """The same of the ServiceMonitor, with models made from the operator's definitions."""
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    written = yaml.safe_load((DEPLOY / "kubernetes-monitoring.yaml").read_text())
    read = ServiceMonitor.model_validate(written)
    return written, json.loads(read.model_dump_json(by_alias=True, exclude_none=True))


def _check_with_model(what: str, both: tuple[Any, Any]) -> None:
    print("==>", what, flush=True)
    wrong = list(_lost(*both))
    if wrong:
        raise RuntimeError(f"{what} does not know: {', '.join(wrong)}")


def _lost(written: Any, read: Any, place: str = "") -> Iterator[str]:
    """The places of what was written and is not there, or is another, after it was read."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            yield from _lost(value, read.get(key), f"{place}/{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from _lost(one, other, f"{place}/{index}")
    elif written != read:
        yield place


def _run(*command: str) -> str:
    """What a program writes to standard error; the rest is printed."""
    print("==>", *_shown(command), flush=True)
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "notice"}
    done = subprocess.run(command, check=False, text=True, capture_output=True, env=environment)
    if done.returncode:
        print(done.stdout + done.stderr, flush=True)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stderr


def _shown(command: Sequence[str]) -> Iterator[str]:
    """The words without the way to the repository."""
    for word in command:
        yield word.replace(f"{ROOT}/", "")
