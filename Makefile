# Targets for people and for CI; each sets up what it needs.  make help lists them.
SHELL := /bin/bash
PY := .venv/bin/python
.DEFAULT_GOAL := help

.PHONY: help setup demo story parts test check cluster bench bench-pauses bench-cluster lock

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## install everything into .venv and the cache directory; safe to repeat
	@scripts/setup

demo: setup ## dump, kill and restore a real training job; writes out/demo/
	@$(PY) -m demo.run --out out/demo

story: cluster ## on that cluster a pod is moved as it counts; a training job of two pods is lost and comes back
	@scripts/cluster deploy
	@demo/migrate
	@demo/jobset

check: setup ## linters, types, layers
	@scripts/check

parts: setup
	@tests/cluster/build
	@tests/vm/build

test: check parts ## all tests: unit and property, with the real CRIU, on a real cluster
	@scripts/test

cluster: setup ## start a real two-node Kubernetes here; scripts/cluster uses and ends it
	@scripts/cluster up

bench: setup ## measure against criu, tar, zstd, restic and borg; writes bench/report.md
	@scripts/bench-setup
	@$(PY) -m bench

bench-pauses: setup ## measure how long jobs stand still, what copying costs them, and how soon they are back; writes bench/pauses.md
	@$(PY) -m bench.pauses

bench-cluster: cluster ## measure on that cluster; writes bench/incluster/report.md
	@$(PY) -m bench.incluster

lock: ## pin the newest versions that pyproject.toml allows
	@scripts/lock
