# An image of the engine, for processors or for NVIDIA GPUs.
#
#   docker build --target cpu -t tokasaurus:cpu .
#   docker build --target cuda -t tokasaurus:cuda .
#   docker build --target cuda --build-arg EXTRAS=kuberay -t tokasaurus:kuberay .
#
#   docker run --init -p 127.0.0.1:10210:10210 tokasaurus:cpu
#   docker run --init -p 10210:10210 --gpus all --shm-size 1g -e TOKASAURUS_API_KEY \
#       -v "$HOME/.cache/huggingface:/home/toka/.cache/huggingface" tokasaurus:cuda model=...
#
# docs/deployment.md says more. `make test-deploy` runs the steps of the cpu target without Docker.

FROM python:3.11.14-slim-bookworm AS base
ENV VIRTUAL_ENV=/opt/tokasaurus
# g++ compiles attention for the processor that is there, and what Triton launches. wget is for
# health checks, KubeRay's too. Debian keeps no old versions, so none can be named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 toka

FROM base AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=parquet
WORKDIR /src
COPY constraints.txt ./
# PyPI's torch brings gigabytes of CUDA along, so torch alone comes from PyTorch's index.
RUN python -m venv "$VIRTUAL_ENV" \
    && "$VIRTUAL_ENV/bin/pip" install --no-cache-dir --no-deps -c constraints.txt \
        --index-url "$TORCH_INDEX" torch
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY tokasaurus tokasaurus
RUN "$VIRTUAL_ENV/bin/pip" install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM base AS build-cuda
ARG EXTRAS=parquet
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv "$VIRTUAL_ENV" \
    && "$VIRTUAL_ENV/bin/pip" install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY tokasaurus tokasaurus
RUN "$VIRTUAL_ENV/bin/pip" install --no-cache-dir -c constraints.txt ".[cuda,$EXTRAS]"

FROM base AS engine
ENV PATH=$VIRTUAL_ENV/bin:$PATH
WORKDIR /home/toka
USER 1000
# Volumes are mounted here: models and compiled kernels; batches. They take the owner of these.
RUN mkdir -p .cache .local/share/tokasaurus
EXPOSE 10210
# /health says 503 until the weights are loaded. Large ones take longer: --health-start-period.
HEALTHCHECK --start-period=10m --interval=30s --timeout=10s \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:10210/health"]
# A container's ports are its own. Later flags win over this one.
ENTRYPOINT ["toka", "host=0.0.0.0"]

FROM engine AS cuda
# What NVIDIA's container toolkit gives the container; the rest of CUDA comes with torch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/tokasaurus /opt/tokasaurus

FROM engine AS cpu
COPY --from=build-cpu /opt/tokasaurus /opt/tokasaurus
