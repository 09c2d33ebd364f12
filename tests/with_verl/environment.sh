#!/usr/bin/env bash
# Makes an environment for the tests with veRL, on top of one that has the package and its tools.
#
#     tests/with_verl/environment.sh .venv 0.9.1 .venv-verl-0.9.1
#
# Of veRL's own requirements it installs what the rollout needs: no second torch, and no trainer.
# The lines of veRL until 0.8 want NumPy 1, and with it older builds of what is compiled for it.
set -euo pipefail
base=$1 version=$2 directory=$3
stamp=$directory/.installed
[ "$stamp" -nt pyproject.toml ] && exit 0

echo "==> creating $directory with veRL $version"
"$base/bin/python" -m venv "$directory"
site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/zz-base.pth"
install() { "$directory/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install ray==2.60.0 omegaconf==2.3.1 hydra-core==1.3.8 codetiming==1.4.0 cachetools==8.0.0 \
    datasets==5.2.0 pillow 'pyvers<0.2' orjson importlib_metadata
install --no-deps tensordict==0.10.0 "verl==$version"
if [ "${version%.*}" = 0.7 ] || [ "${version%.*}" = 0.8 ]; then
    install --no-deps 'numpy<2' 'pandas<2.3' 'scipy<1.14' 'scikit-learn<1.6' 'pyarrow<22'
fi
install --no-deps --editable .  # for the entry point
touch "$stamp"
