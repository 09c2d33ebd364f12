"""The Dockerfile and the files in deploy/ name paths, extras, commands and flags that exist.

``make test-deploy`` checks them with their validators, and runs the Dockerfile's steps.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import yaml
from dockerfile import Build, Stage, stages_of
from documentation import ROOT

from tokasaurus.commands import COMMANDS
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import parse_command_line

DEPLOY = ROOT / "deploy"
STAGES = stages_of((ROOT / "Dockerfile").read_text())
PORT = EngineConfig().port


def values(name: str, stage: Stage) -> list[str]:
    return [step.value for step in stage.steps if step.name == name]


def documents(name: str):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def of_kind(name: str, kind: str):
    (found,) = [each for each in documents(name) if each["kind"] == kind]
    return found


def engine_config(words: list[str]) -> EngineConfig:
    return parse_command_line(words, {}, lambda _: "")


def test_the_dockerfile_has_two_targets_for_a_user_without_rights():
    assert {"cpu", "cuda"} < set(STAGES)
    for target in ("cpu", "cuda"):
        line = [STAGES[target]]
        while line[-1].parent in STAGES:
            line.append(STAGES[line[-1].parent])
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", line[-1].parent)
        (user,) = [value for stage in line for value in values("USER", stage)]
        assert int(user) > 0


def test_what_the_dockerfile_copies_is_there():
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for stage in STAGES.values():
        for value in values("COPY", stage):
            source, *words = value.split()
            if source.startswith("--from="):
                assert source.removeprefix("--from=") in STAGES, value
                continue
            for path in [source, *words[:-1]]:
                assert (ROOT / path).exists(), path
                assert f"!{path}" in kept, f".dockerignore leaves out {path}"


def test_the_dockerfile_installs_extras_that_exist_in_versions_that_are_tested():
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    text = (ROOT / "Dockerfile").read_text()
    named = re.findall(r"EXTRAS=([\w,]+)", text)
    installed = re.findall(r'"\.\[(.*?)\]"', text)
    for names in [*named, *installed]:
        assert set(re.findall(r"(?<!\$)\b\w+", names)) - {"EXTRAS"} <= extras, names
    assert len(installed) == 2
    for stage in STAGES.values():
        for command in values("RUN", stage):
            for install in re.findall(r"pip\" install[^&]*", command):
                assert "-c constraints.txt" in install


def test_the_entry_point_and_the_health_check_agree_with_the_engine():
    engine = STAGES["engine"]
    (entry_point,), (exposed,) = values("ENTRYPOINT", engine), values("EXPOSE", engine)
    command, *words = json.loads(entry_point)
    assert command in {each.name for each in entry_points(group="console_scripts")}
    assert engine_config(words).host == "0.0.0.0"
    assert int(exposed) == PORT
    (check,) = values("HEALTHCHECK", engine)
    assert f":{PORT}/health" in check


def test_kubernetes_runs_the_engine_on_the_devices_that_it_asks_for():
    engines = of_kind("kubernetes.yaml", "StatefulSet")["spec"]
    pod = engines["template"]["spec"]
    (container,) = pod["containers"]
    config = engine_config(container["args"])
    num_workers = config.dp_size * config.pp_size * config.tp_size
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(num_workers)
    assert [port["containerPort"] for port in container["ports"]] == [PORT]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    (volume,) = engines["volumeClaimTemplates"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert Path(config.data_dir).is_relative_to(mounts[volume["metadata"]["name"]])


def test_kubernetes_gives_a_drain_its_time():
    pod = of_kind("kubernetes.yaml", "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed_s = int(pause_s) + engine_config(container["args"]).shutdown_timeout_s
    assert pod["terminationGracePeriodSeconds"] > needed_s


def test_kubernetes_selects_the_engines_pods():
    engines = of_kind("kubernetes.yaml", "StatefulSet")["spec"]
    labels = engines["template"]["metadata"]["labels"]
    selectors = [
        of_kind("kubernetes.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        engines["selector"]["matchLabels"],
    ]
    services = [each for each in documents("kubernetes.yaml") if each["kind"] == "Service"]
    selectors += [service["spec"]["selector"] for service in services]
    assert len(selectors) == 4
    for selector in selectors:
        assert selector.items() <= labels.items()
    (headless,) = [each for each in services if each["spec"].get("clusterIP") == "None"]
    assert headless["metadata"]["name"] == engines["serviceName"]


def test_the_operator_scrapes_the_service_with_its_key():
    spec = of_kind("kubernetes-monitoring.yaml", "ServiceMonitor")["spec"]
    services = [each for each in documents("kubernetes.yaml") if each["kind"] == "Service"]
    wanted = spec["selector"]["matchLabels"].items()
    # One of them: the pods of two would be scraped twice.
    (service,) = [each for each in services if wanted <= each["metadata"].get("labels", {}).items()]
    (endpoint,) = spec["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert service["metadata"]["labels"][spec["jobLabel"]] == "tokasaurus"
    pod = of_kind("kubernetes.yaml", "StatefulSet")["spec"]["template"]["spec"]
    environment = {each["name"]: each for each in pod["containers"][0]["env"]}
    key = environment["TOKASAURUS_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert endpoint["authorization"]["credentials"] == key


def unit() -> dict[str, str]:
    """The settings of the systemd unit; of those that come twice, the last."""
    text = (DEPLOY / "tokasaurus.service").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_starts_an_engine_that_can_drain():
    settings = unit()
    _, *words = settings["ExecStart"].split()
    words = [word for word in words if not word.startswith("config=")]
    config = engine_config(words)
    assert int(settings["TimeoutStopSec"]) > config.shutdown_timeout_s
    assert config.data_dir.startswith("${STATE_DIRECTORY}/")
    assert config.cartridge_dir.startswith("${STATE_DIRECTORY}/")
    credential, _ = settings["LoadCredential"].split(":")
    assert config.api_key_file == f"${{CREDENTIALS_DIRECTORY}}/{credential}"


def test_the_unit_waits_for_the_engine_and_restarts_it_with_tokas_command():
    settings = unit()
    assert settings["Type"] == "notify"
    program, command = settings["ExecReload"].split()
    assert program == settings["ExecStart"].split()[0]
    assert command in COMMANDS


def test_the_unit_does_not_start_an_engine_with_wrong_flags_again():
    done = subprocess.run([sys.executable, "-m", "tokasaurus.entry", "no_such_flag=1"])
    assert str(done.returncode) == unit()["RestartPreventExitStatus"]


def test_compose_mounts_what_the_programs_read():
    services = documents("compose.yaml")[0]["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), volume
    mounted = {
        volume.split(":")[1]: volume.split(":")[0]
        for service in services.values()
        for volume in service["volumes"]
    }
    assert (
        f"--config.file={_beside(mounted, 'prometheus.yaml')}" in services["prometheus"]["command"]
    )
    rules = documents("monitoring/prometheus.yaml")[0]["rule_files"]
    here = Path(_beside(mounted, "prometheus.yaml")).parent
    assert [str(here / name) for name in rules] == [_beside(mounted, "alerts.yaml")]
    dashboard = _beside(mounted, "dashboard.json")
    assert (
        services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    )
    (provider,) = documents("monitoring/grafana-dashboards.yaml")[0]["providers"]
    assert provider["options"]["path"] == str(Path(dashboard).parent)


def _beside(mounted: dict[str, str], name: str) -> str:
    """Where a container has a file of deploy/monitoring."""
    (place,) = [place for place, source in mounted.items() if source == f"./monitoring/{name}"]
    return place


def test_compose_runs_the_engine_of_the_image():
    compose = documents("compose.yaml")[0]
    engine = compose["services"]["engine"]
    config = engine_config(engine["command"].replace("${ARGS:-}", "").split())
    assert int(engine["stop_grace_period"].removesuffix("s")) > config.shutdown_timeout_s
    for more in (engine, documents("compose.cuda.yaml")[0]["services"]["engine"]):
        assert more["build"]["target"] in STAGES
    (secret,) = engine["secrets"]
    assert config.api_key_file == f"/run/secrets/{secret}"
    (scraping,) = documents("monitoring/prometheus.yaml")[0]["scrape_configs"]
    assert scraping["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert scraping["static_configs"] == [{"targets": [f"engine:{PORT}"]}]
    assert secret in compose["services"]["prometheus"]["secrets"]
    # A volume takes the owner of the directory that the image has in its place.
    made = " ".join(values("RUN", STAGES["engine"])).split()
    for volume in engine["volumes"]:
        assert volume.split(":")[1].removeprefix("/home/toka/") in made


def test_the_dashboard_is_what_its_program_writes():
    program = DEPLOY / "monitoring/make_dashboard.py"
    written = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert (DEPLOY / "monitoring/dashboard.json").read_text() == written.stdout


def test_dashboard_and_alerts_ask_for_metrics_that_the_engine_has():
    known = (ROOT / "tokasaurus/server/metrics.py").read_text()
    for name in ("dashboard.json", "alerts.yaml"):
        asked = set(re.findall(r"\btokasaurus_(\w+)", (DEPLOY / "monitoring" / name).read_text()))
        assert len(asked) > 5
        for metric in asked:
            plain = re.sub(r"_(total|bucket)$", "", metric)
            names = {plain, plain.removeprefix("replica_"), f"tokasaurus_{plain}"}
            assert any(f'"{each}"' in known for each in names), metric


def test_kuberay_has_room_for_the_engine_that_it_runs():
    job = of_kind("kuberay.yaml", "RayJob")["spec"]
    command, *words = shlex.split(job["entrypoint"])
    config = engine_config(words)
    assert (command, config.launcher) == ("toka", "ray")
    cluster = job["rayClusterSpec"]
    num_devices = 0
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        num_devices += group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.dp_size * config.pp_size * config.tp_size == num_devices
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]


def test_kuberays_service_leads_to_the_pod_of_the_server():
    service = of_kind("kuberay.yaml", "Service")["spec"]
    assert [port["port"] for port in service["ports"]] == [PORT]
    cluster = of_kind("kuberay.yaml", "RayJob")["spec"]["rayClusterSpec"]
    pod, *others = [
        group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    for other in others:
        assert not service["selector"].items() <= other["metadata"]["labels"].items()
    (port,) = [port for port in pod["spec"]["containers"][0]["ports"] if port["name"] == "http"]
    assert port["containerPort"] == PORT


def test_no_file_holds_a_key():
    for path in [ROOT / "Dockerfile", *filter(Path.is_file, DEPLOY.rglob("*"))]:
        assert not re.search(r"api_key=|API_KEY=|sk-\w{8}", path.read_text()), path


def test_the_slurm_script_runs_one_rank_for_each_replica(tmp_path: Path):
    """``srun`` and ``scontrol`` stand in for SLURM's: they print what they were told."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "MODEL": "/models/my model",
        "TOKASAURUS_API_KEY": "key",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NTASKS": "16",
    }
    script = ["/bin/bash", str(DEPLOY / "slurm.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    start = words.index("python")
    assert words[start : start + 3] == ["python", "-m", "tokasaurus.launch.torchrun"]
    assert (ROOT / "tokasaurus/launch/torchrun.py").is_file()
    config = engine_config(words[start + 3 :])
    assert (config.model, config.dp_size) == ("/models/my model", 16)
    assert config.launcher == "local"
    for name in ("MODEL", "TOKASAURUS_API_KEY"):
        rest = {key: value for key, value in environment.items() if key != name}
        refused = subprocess.run(script, env=rest, capture_output=True, text=True)
        assert refused.returncode != 0
        assert name in refused.stderr


def test_steps_of_a_dockerfile_run_in_a_directory_of_their_own(tmp_path: Path):
    context, root = tmp_path / "context", tmp_path / "root"
    context.mkdir()
    root.mkdir()
    (context / "word.txt").write_text("hello")
    text = """\
FROM scratch AS base
ENV PLACE=/opt/place
RUN apt-get update \\
    && apt-get install -y nothing
FROM base AS made
ARG NAME=world
WORKDIR /src
COPY word.txt ./
RUN mkdir -p "$PLACE" \\
    && echo "$(cat word.txt) $NAME" > "$PLACE/said"
FROM base AS last
ENV LINE=$PLACE/said:$REST
COPY --from=made /opt/place /opt/place
ENTRYPOINT ["cat"]
"""
    build = Build(text, context, root, {"NAME": "you"}, {"REST": "rest", "PATH": "/usr/bin:/bin"})
    image = build.run("last")
    assert (root / "opt/place/said").read_text() == "hello you\n"
    assert image.environment["LINE"] == f"{root}/opt/place/said:rest"
    assert image.entrypoint == ["cat"]
    assert build.left_out == ["apt-get update && apt-get install -y nothing"]
