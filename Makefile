# Targets for people and for CI; each sets up what it needs.  make help lists them.
SHELL := /bin/bash
PY := .venv/bin/python
.DEFAULT_GOAL := help

.PHONY: help setup demo test check cluster bench lock cluster

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## install everything into .venv and the cache directory; safe to repeat
	@scripts/setup

demo: setup ## dump, kill and restore a real training job; writes out/demo/
	@$(PY) -m demo.run --out out/demo

check: setup ## linters, types, layers
	@scripts/check

test: check cluster ## all tests: unit and property, with the real CRIU, on a real cluster
	@$(PY) -m pytest

cluster: setup ## build what the test cluster is made of; a quarter of an hour the first time
	@tests/cluster/build

cluster: setup ## start a real two-node Kubernetes here; scripts/cluster uses and ends it
	@scripts/cluster up

bench: setup ## measure against criu, tar, zstd, restic and borg; writes bench/report.md
	@scripts/bench-setup
	@$(PY) -m bench

lock: ## pin the newest versions that pyproject.toml allows
	@scripts/lock
