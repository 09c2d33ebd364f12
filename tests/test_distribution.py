"""What `make dist` builds works outside the checkout: the commands and the bundled model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from engine_process import EngineProcess

from tokasaurus.demo.corpus.chat_table import JOKES

pytestmark = [pytest.mark.engine, pytest.mark.processes]

CHECKOUT = Path(__file__).parent.parent
COMMANDS = (
    "toka",
    "tksrs",
    "toka-ping",
    "toka-chat",
    "toka-download",
    "toka-batch",
    "toka-verify",
    "toka-cartridge",
    "toka-bench",
)


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist: so the sdist has all that a build needs."""
    directory = tmp_path_factory.mktemp("dist")
    # A build writes into the tree that it builds from, so it gets one of its own.
    source = directory / "source"
    shutil.copytree(CHECKOUT / "tokasaurus", source / "tokasaurus")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    options = ("--no-isolation", "--outdir", directory)
    run(sys.executable, "-m", "build", *options, source, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(
    scope="module",
    params=["lent packages", pytest.param("own packages", marks=pytest.mark.long)],
)
def environment(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The commands of a new virtual environment in which only the wheel was installed.

    Its dependencies are downloaded only in the heavy run. Otherwise the environment that runs
    the tests lends its own, without the checkout that is installed there.
    """
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory)
    python = directory / "bin" / "python"
    constraints = ("-c", CHECKOUT / "constraints.txt") if request.param == "own packages" else ()
    dependencies = () if constraints else ("--no-deps",)
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet")
    install = (*pip, "install", "--disable-pip-version-check")
    run(*install, *constraints, *dependencies, wheel, cwd=directory)
    if not constraints:
        # A line in a .pth file adds a directory and reads no .pth files there: the checkout's
        # own, by which it is installed, stays unread.
        (site_packages,) = directory.glob("lib/python*/site-packages")
        (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"


def test_the_wheel_has_the_data_and_the_kernels_and_nothing_else_than_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "py.typed",
        "client/lm/configs/finer/memoryless_toka_llama3b.yaml",
        "client/lm/data/finer.jsonl",
        "demo/model/config.json",
        "demo/model/model.safetensors",
        "demo/model/tokenizer.json",
        "model/backend/cpu/operators.cpp",
        "server/page/index.html",
        "server/page/main.js",
        "model/backend/cpu/paged_attention.cpp",
        "model/backend/cpu/products.h",
        "model/backend/cpu/vectors.h",
    ):
        assert f"tokasaurus/{name}" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"tokasaurus", wheel.name.split("-py3")[0] + ".dist-info"}


def test_commands_of_an_installed_wheel_have_help(environment, tmp_path):
    for command in COMMANDS:
        assert command.replace("tksrs", "toka") in run(
            environment / command, "--help", cwd=tmp_path
        )


@pytest.mark.long
def test_an_installed_engine_answers_toka_ping_and_an_evaluation_with_the_bundled_model(
    environment, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = "import tokasaurus; print(tokasaurus.__file__)"
    found = run(environment / "python", "-c", where, cwd=tmp_path).strip()
    assert Path(found).is_relative_to(environment.parent)
    engine = EngineProcess(tmp_path / "log", program=[environment / "toka"])
    try:
        engine.wait_ready()
        ping = (environment / "toka-ping", "prompt=tell me a joke", "max_tokens=64", "chat=True")
        said = run(*ping, f"port={engine.port}", "temperature=0", cwd=tmp_path)
        evaluation = (environment / "python", "-m", "tokasaurus.client.lm.run")
        shipped = ("--config", "configs/memoryless_toka_demo.yaml", "evaluation.limit=5")
        address = f"agent.lm_config.base_url={engine.url}"
        table = run(*evaluation, *shipped, address, cwd=tmp_path)
    finally:
        engine.stop()
    assert any(joke in said for joke in JOKES)
    assert "100.0%" in table
