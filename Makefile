# The front door. `make` or `make help` lists the targets; each one sets up what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# With galaxy.yml at the root, molecule looks elsewhere for the scenarios.
export MOLECULE_GLOB := molecule/*/molecule.yml
# uv trusts what the system trusts.
export UV_SYSTEM_CERTS := 1
# Ansible refuses to start without a UTF-8 locale.
export LC_ALL := C.UTF-8

# Without its compiled files every call of Ansible compiles all of Ansible again: a second each time.
unexport PYTHONDONTWRITEBYTECODE

UV := .venv/bin/uv
RUN := .venv/bin/python tests/run.py

##@ Try it
.PHONY: demo demo-down
demo: setup ## From nothing to a chat completion over HTTPS on this machine; DEMO_HOSTS=2 for more inference hosts
	@.venv/bin/python -m demo up

demo-down: ## Remove what make demo made, and nothing else
	@python3 -m demo down

##@ Test it
.PHONY: test lint unit molecule e2e
test: setup ## Everything: lint, unit, molecule and end to end
	@$(RUN) test

lint: setup ## yamllint, ansible-lint, ruff, mypy, luacheck, documentation of plugins and roles, syntax checks, changelog
	@$(RUN) lint

unit: setup ## Unit tests
	@$(RUN) unit

molecule: setup ## The scenario of every role on test hosts; SCENARIO=gateway for one
	@$(RUN) molecule $(SCENARIO)

e2e: setup ## End to end: a fleet of test hosts, a real model, real requests
	@$(RUN) e2e

.PHONY: drills gpu
drills: setup ## What takes long: every test on every system (an hour), Debian's real driver, built by DKMS (20 minutes), the real vLLM in containers (an hour), a fleet that lives under load (an hour)
	@.venv/bin/python -m pytest -s tests/drills

gpu: setup ## On a machine with an NVIDIA GPU, as root: deploy there, break it, measure (half an hour); STEPS=deploy,unit for a part
	@.venv/bin/python -m tests.gpu $(if $(STEPS),--steps $(STEPS))

##@ Work on it
.PHONY: setup build docs lock lock-certbot lock-controller clean
setup: ## Make .venv, the controller's Python environment, from requirements.lock; SETUP_PYTHON=3.11 for another Python than the newest here
	@tools/setup.sh

build: setup ## Build the collection gpufleet.llm into build/
	@ansible-galaxy collection build --force --output-path build .

docs: setup ## Regenerate the role READMEs, docs/inventory.md and docs/versions.md
	@.venv/bin/python tools/docs.py

lock: setup ## Lock a vLLM release: VLLM_VERSION=0.33.0 DEVICE=cuda|cpu, EXTRAS=audio for vllm_extras
	@$(if $(VLLM_VERSION),,$(error VLLM_VERSION is missing: make lock VLLM_VERSION=0.33.0 DEVICE=cuda))
	@$(if $(DEVICE),,$(error DEVICE is missing: make lock VLLM_VERSION=$(VLLM_VERSION) DEVICE=cuda))
	@.venv/bin/python tools/lock.py --version $(VLLM_VERSION) --device $(DEVICE) --extras "$(EXTRAS)"

lock-certbot: setup ## Lock the newest certbot and its plugins for DNS again (role tls_certificate)
	@.venv/bin/python tools/lock_certbot.py

lock-controller: setup ## Lock the controller's Python environment again, from pyproject.toml
	@$(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 --extra test \
	  --upgrade-package ansible --upgrade-package ansible-core \
	  --custom-compile-command "make lock-controller" pyproject.toml -o requirements.lock
	@grep -o '^uv==[0-9.]*' tools/uv.txt | $(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 \
	  --custom-compile-command "make lock-controller" - -o tools/uv.txt

clean: ## Remove what can be made again: .venv, build/, logs and caches (not a running demo)
	@rm -rf .venv .cache/python3.11 build .cache/bootstrap .cache/logs .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
