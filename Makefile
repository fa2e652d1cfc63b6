# Every target sets up what it needs in .venv, from the pins of requirements.lock; `clients` also in .venv-clients.
PYTHON ?= python3
MODEL ?=
ARGS ?=
SECONDS ?= 30
PROFILES ?= cpu
DEVICE ?= cpu
TARGETS ?= completion request text to_engine to_api safetensors config index vocabulary merges tokenizer_json pickled release
.PHONY: run test lint format types check clients browser faults deploy package notices image-test ray-test up bench inside load soak overload fuzz image

run: .venv/ready  ## serve MODEL, a folder or a hub id; without one, the embedded demo model
	.venv/bin/megatron-gpt2 serve $(MODEL) $(ARGS)

test: .venv/ready  ## the tests
	.venv/bin/pytest

lint: .venv/ready
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

check: lint types test  ## what CI runs

clients: .venv/ready .venv-clients/ready  ## packages that people use as clients, against a running service
	.venv-clients/bin/pytest tests/clients -W default $(ARGS)

browser: .venv/ready .venv-browser/ready  ## the playground at / in a real Chromium; Debian's is installed, which needs root
	sh tests/packages.sh chromium=chromium /usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf=fonts-liberation
	PYTHONPATH=.venv-browser .venv/bin/pytest tests/browser -W default $(ARGS)

faults: .venv/ready  ## faults injected into a running service, and short overloads (docs/reliability.md)
	.venv/bin/pytest tests/faults --timeout 240 $(ARGS)

deploy: .venv/ready .venv-deploy/ready  ## manifests, compose, alert rules and dashboard, with the real tools; what apt has is installed
	sh tests/deploy/tools.sh
	.venv/bin/pytest tests/deploy --timeout 300 $(ARGS)

package: .venv/ready .venv-package/ready  ## sdist and wheel, built, and the wheel used where nothing else is
	.venv/bin/pytest tests/package --timeout 120 $(ARGS)

notices: .venv/ready .venv-package/ready  ## THIRD_PARTY_NOTICES.md anew, of what the wheel installs
	.venv/bin/python -m tests.package.notices

image-test: .venv/ready  ## the Dockerfile built by buildah, and its image run by podman; needs root
	sh tests/packages.sh buildah=buildah podman=podman runc=runc catatonit=catatonit debootstrap=debootstrap nsenter=util-linux \
		docker-compose=docker-compose /usr/lib/cni/bridge=containernetworking-plugins iptables=iptables ip=iproute2
	.venv/bin/pytest tests/image --timeout 900 $(ARGS)

ray-test: .venv/ready .venv-ray/ready  ## the application for Ray Serve on a local cluster of two nodes, one of which is lost; not in CI
	PYTHONPATH=.venv-ray .venv/bin/pytest tests/ray -W default --timeout 240 $(ARGS)

bench: .venv/ready  ## milliseconds a step of the bare runner beside transformers, on this machine
	.venv/bin/python -m bench.decode $(ARGS)

inside: .venv/ready  ## the same step inside the service beside the bare runner
	.venv/bin/python -m bench.inside $(ARGS)

load: .venv/ready  ## load over HTTP on a running service: throughput and latencies
	.venv/bin/python -m bench.load $(ARGS)

soak: .venv/ready  ## minutes of mixed load and faults: every answer is checked, its memory watched; soak.svg shows it
	.venv/bin/python -m bench.soak --out soak $(ARGS)

overload: .venv/ready  ## ten times as many requests as the service can answer
	.venv/bin/python -m bench.overload --check $(ARGS)

fuzz: .venv-fuzz/ready  ## each fuzzing target for SECONDS; needs Python 3.11
	for target in $(TARGETS); do PYTHONPATH=.venv-fuzz .venv/bin/python -m tests.fuzz.atheris_targets $$target $(SECONDS) || exit 1; done

up:  ## the image and what watches it, by docker compose: PROFILES="cpu observability", or gpu
	REVISION=$$(git rev-parse HEAD) docker compose -f docker/compose.yaml $(foreach profile,$(PROFILES),--profile $(profile)) up --build

image:  ## the container image, megatron-gpt2; with DEVICE=gpu megatron-gpt2:gpu, for NVIDIA GPUs
	docker build -t megatron-gpt2$(if $(filter gpu,$(DEVICE)),:gpu) --build-arg DEVICE=$(DEVICE) --build-arg REVISION=$$(git rev-parse HEAD) $(ARGS) .

.venv: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch .venv/ready

# Only what .venv has not: beside it, so that torch is not there twice.
.venv-fuzz/ready: requirements-fuzz.lock .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check --upgrade --target .venv-fuzz -r requirements-fuzz.lock
	touch .venv-fuzz/ready

.venv-browser/ready: requirements-browser.lock .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-browser -r requirements-browser.lock
	touch .venv-browser/ready

.venv-ray/ready: requirements-ray.lock .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-ray -r requirements-ray.lock
	touch .venv-ray/ready

# What the wheel declares and no more, at the pins.
.venv-package/ready: requirements.lock .venv/ready
	rm -rf .venv-package build
	$(PYTHON) -m venv .venv-package
	.venv/bin/python -m build --no-isolation --outdir .venv-package/dist .
	.venv-package/bin/pip install --quiet --disable-pip-version-check -c requirements.lock .venv-package/dist/*.whl
	touch .venv-package/ready

.venv-deploy/ready: requirements-deploy.lock
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/pip install --quiet --disable-pip-version-check -r requirements-deploy.lock
	touch .venv-deploy/ready

# The service runs from .venv; the link puts its command where the tests look for it, beside their own interpreter.
.venv-clients/ready: requirements-clients.lock
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check -r requirements-clients.lock
	ln -sf ../../.venv/bin/megatron-gpt2 .venv-clients/bin/
	touch .venv-clients/ready
