"""``make gpu-bundle``: the wheels that a GPU machine without a network lacks, and a script.

    python tests/gpu_bundle.py DIRECTORY

The machine has Python 3.12 on Linux, PyTorch for CUDA and transformers, and what these need that
is large. Everything else that an engine imports goes into ``DIRECTORY/wheels``: the engine itself,
its other dependencies, and FlashInfer with those of its dependencies that attention needs. Where
the directory is copied to the machine, ``DIRECTORY/install.sh PYTHON ENVIRONMENT`` installs it.

``make gpu-kernels`` adds kernels of FlashInfer, which it would otherwise build there.

pip resolves this as it would on that machine: empty wheels stand for what is there. The last step
resolves it again, from the directory alone. The exit status is 1 if that fails, or if the wheels
take more than 60 MiB.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["MOST_BYTES", "PRESENT", "install_script", "main", "make_stub", "too_large"]

MOST_BYTES = 60 << 20

ROOT = Path(__file__).parents[1]

PRESENT = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    # What these two bring, of the packages that are large.
    "numpy": "2.5.2",
    "huggingface_hub": "1.33.0",
    "tokenizers": "0.23.2",
    "safetensors": "0.8.0",
}
"""What is on the machine."""

# Distinguishes an empty wheel from the one that has this version in an index.
_LABEL = "+present"

# FlashInfer's metadata names libraries for newer devices, of hundreds of megabytes. These are
# enough to import it and to build the kernels of attention.
_FLASHINFER = "flashinfer-python==0.6.14"
_FOR_FLASHINFER = (
    *("apache-tvm-ffi>=0.1.6,<0.2", "nvidia-ml-py", "ninja"),
    *("filelock", "jinja2", "packaging", "requests", "tqdm"),
)

# Ubuntu 22.04, or later.
_NEWEST_GLIBC = 35
_PLATFORMS = [
    "manylinux2014_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in range(17, _NEWEST_GLIBC + 1)),
]
_TARGET = [
    *("--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:"),
    *(word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)),
    *(word for platform in _PLATFORMS for word in ("--platform", platform)),
]

_INSTALL = """\
#!/bin/sh
# Installs the engine without a network: install.sh PYTHON DIRECTORY
# makes an environment in DIRECTORY, in which the engine runs on the PyTorch that PYTHON has.
set -e
python=${1:?name the python that has PyTorch}
environment=${2:?name the directory of the environment}
wheels=$(cd "$(dirname "$0")/wheels" && pwd)
# PYTHON brings pip, too: on some systems the module that gives an environment its own is missing.
"$python" -m venv --clear --without-pip "$environment"
inner=$environment/bin/python
# If PYTHON is of an environment itself, --system-site-packages would not show what that has.
"$python" -c 'import os, sys
for path in sys.path:
    if os.path.basename(path) in ("site-packages", "dist-packages"):
        print(f"import site; site.addsitedir({path!r})")' \\
    > "$("$inner" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/present.pth"
"$inner" -m pip install --no-index --find-links "$wheels" tokasaurus FOR_IT
# Its metadata names more than attention needs.
"$inner" -m pip install --no-index --find-links "$wheels" --no-deps FLASHINFER
kernels=$wheels/../kernels
if [ -d "$kernels" ]; then
    # FlashInfer takes what lies there, and builds what does not.
    built=$("$inner" -c 'import importlib.util as found, os
print(os.path.dirname(found.find_spec("flashinfer").origin))')/data/aot
    mkdir -p "$built"
    cp -r "$kernels/." "$built"
fi
"$inner" -c 'import tokasaurus; print("installed the engine", tokasaurus.__version__)'
"$inner" -c 'import flashinfer; print("installed FlashInfer", flashinfer.__version__)' \\
    || echo "FlashInfer cannot be imported: what is checked is checked without it"
"""


def main(directory: str) -> int:
    target = Path(directory)
    wheels = target / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as made:
        stubs = Path(made) / "stubs"
        stubs.mkdir()
        for name, version in PRESENT.items():
            make_stub(stubs, name, version + _LABEL)
        constraints = Path(made) / "constraints.txt"
        constraints.write_text(_constraints())
        print("==> building the engine's wheel")
        # From an sdist: a wheel of the checkout itself would have what lies in its build folder.
        _run("build", "--no-isolation", "--outdir", made, ROOT)
        (built,) = Path(made).glob("tokasaurus-*.whl")
        engine = shutil.copy(built, wheels)
        print("==> collecting wheels for Python 3.12 on Linux")
        links = ("--find-links", stubs, "--constraint", constraints)
        _pip("download", *_TARGET, *links, "--dest", wheels, engine, *_FOR_FLASHINFER)
        _pip("download", *_TARGET, "--no-deps", "--dest", wheels, _FLASHINFER)
        for name in PRESENT:
            for stub in wheels.glob(f"{name}-*{_LABEL}-*.whl"):
                stub.unlink()
        script = target / "install.sh"
        script.write_text(install_script())
        script.chmod(0o755)
        print("==> resolving it again from the directory alone")
        alone = ("--no-index", "--find-links", wheels, "--find-links", stubs)
        options = ("--dry-run", "--quiet", "--target", Path(made) / "target")
        _pip("install", *options, *_TARGET, *alone, "tokasaurus", *_FOR_FLASHINFER)
        _pip("install", *options, *_TARGET, *alone, "--no-deps", _FLASHINFER)
    files = sorted(wheels.iterdir(), key=lambda file: -file.stat().st_size)
    total = sum(file.stat().st_size for file in files)
    print(f"{target}: {len(files)} wheels, {total / 2**20:.1f} MiB; the largest are")
    for file in files[:5]:
        print(f"  {file.stat().st_size / 2**20:6.1f} MiB  {file.name}")
    if refusal := too_large(total):
        print(refusal, file=sys.stderr)
        return 1
    return 0


def install_script() -> str:
    """What ``install.sh`` says."""
    others = " ".join(f"'{each}'" for each in _FOR_FLASHINFER)
    return _INSTALL.replace("FOR_IT", others).replace("FLASHINFER", _FLASHINFER)


def too_large(num_bytes: int) -> str | None:
    """Why wheels of this size are refused; None if they are not."""
    if num_bytes <= MOST_BYTES:
        return None
    return (
        f"gpu-bundle: the wheels take {num_bytes / 2**20:.1f} MiB, and a bundle has at most"
        f" {MOST_BYTES / 2**20:.0f}; name what the machine has in PRESENT of tests/gpu_bundle.py"
    )


def make_stub(
    directory: Path, name: str, version: str, modules: Mapping[str, str] | None = None
) -> Path:
    """Writes a wheel that has a name, a version, and no modules but these: source by file."""
    path = directory / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    files = {
        **(modules or {}),
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{information}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: tokasaurus\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(f"{file},sha256={_digest(text)},{len(text)}\n" for file, text in files.items())
    files[f"{information}/RECORD"] = record + f"{information}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


def _digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _constraints() -> str:
    """The versions that CI tests, but for what the machine has."""
    kept = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.split("==")[0].replace("-", "_").lower() not in PRESENT
    ]
    return "\n".join(
        (*kept, *(f"{name}=={version}{_LABEL}" for name, version in PRESENT.items()), "")
    )


def _pip(command: str, *arguments: object) -> None:
    _run("pip", command, "--disable-pip-version-check", "--quiet", *arguments)


def _run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"gpu-bundle: {' '.join(command)} failed:\n{done.stdout}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
