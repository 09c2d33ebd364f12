"""The parts of ``make gpu-bundle`` that need no network."""

from __future__ import annotations

import re
import subprocess
import sys

import torch
from gpu_bundle import MOST_BYTES, PRESENT, install_script, make_stub, too_large


def test_an_empty_wheel_stands_for_what_the_machine_has(tmp_path):
    """pip takes it for the package, and installs nothing but its name."""
    for name, version in PRESENT.items():
        make_stub(tmp_path, name, f"{version}+present")
    target = tmp_path / "target"
    requirements = [f"{name}>={version}" for name, version in PRESENT.items()]
    options = ["--disable-pip-version-check", "--no-index", "--find-links", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(target)]
    subprocess.run([*command, *requirements], check=True)
    assert {path.name for path in target.iterdir()} == {
        f"{name}-{version}+present.dist-info" for name, version in PRESENT.items()
    }


def test_wheels_that_take_too_much_are_refused():
    assert too_large(MOST_BYTES) is None
    assert "take 60.5 MiB, and a bundle has at most 60" in too_large(MOST_BYTES + (1 << 19))


def test_the_script_installs_flashinfer_without_what_it_asks_for(tmp_path):
    script = tmp_path / "install.sh"
    script.write_text(install_script())
    assert "--no-deps flashinfer-python==" in script.read_text()
    subprocess.run(["sh", "-n", str(script)], check=True)
    missing = subprocess.run(["sh", str(script)], capture_output=True, text=True)
    assert missing.returncode != 0
    assert "name the python that has PyTorch" in missing.stderr


def test_the_environment_sees_what_the_environment_of_its_python_has(tmp_path):
    """The python of these tests is of an environment, and so is that of the machine."""
    assert sys.prefix != sys.base_prefix
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("apache_tvm_ffi", "nvidia_ml_py", "ninja", "flashinfer_python"):
        modules = {"flashinfer/__init__.py": "__version__ = 'a stub'"}
        make_stub(wheels, name, "99", modules if name == "flashinfer_python" else None)
    script = tmp_path / "install.sh"
    # Any version stands for the one that is wanted.
    script.write_text(re.sub(r"(==|>=)[\d.,<]+", "", install_script()))
    environment = tmp_path / "environment"
    built = tmp_path / "kernels" / "page" / "page.so"
    built.parent.mkdir(parents=True)
    built.write_text("a library")
    done = subprocess.run(
        ["sh", str(script), sys.executable, str(environment)], capture_output=True, text=True
    )
    assert "installed FlashInfer a stub" in done.stdout, done.stdout + done.stderr
    look = "import importlib.util as u, sys; print(u.find_spec('torch').origin, sys.prefix)"
    found = subprocess.run(
        [str(environment / "bin" / "python"), "-c", look], capture_output=True, text=True
    )
    assert found.stdout.split() == [torch.__file__, str(environment)], found.stderr
    (copied,) = environment.rglob("flashinfer/data/aot/page/page.so")
    assert copied.read_text() == "a library"
    # What it installs is in it, and not beside PyTorch.
    assert len(list(environment.rglob("flashinfer_python-99.dist-info"))) == 1
