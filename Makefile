# A thin skin over nox (see `make nox ARGS=-l`): one line a target. Needs Python >= 3.11, nothing else.
# ARGS goes to the command: `make test-unit ARGS='-k yaml'`. FT_* variables reach the tests as they are.

.DEFAULT_GOAL := help
# Two heavy sessions side by side on a small machine slow each other down five times.
.NOTPARALLEL:
.PHONY: help quickstart exports test test-unit test-smoke test-e2e-workflow test-e2e-real-model test-e2e-quick test-e2e-all \
	test-e2e-gguf test-e2e-mlx test-e2e-ollama test-browser faults faults-all \
	lint format docs bench sabotage nox clean

pinned = $(shell sed -n 's/^$(1)==//p' constraints.txt)
# The file's name carries the versions, so that a new pin makes a new environment.
TOOLS := .tools/nox-$(call pinned,nox)-uv-$(call pinned,uv)
NOX := .tools/bin/python -m nox
PASS := $(if $(ARGS),-- $(ARGS))

help: ## Print the targets (the default)
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

quickstart: $(TOOLS) ## Fine-tune a real 135M model on this machine, align it, and show the proof
	@$(NOX) -s quickstart $(PASS)

exports: $(TOOLS) ## The same, carried to GGUF, MLX and a bundle, and proven in their own runtimes
	@$(NOX) -s exports $(PASS)

test: $(TOOLS) ## Every check and test that this machine can run
	@$(NOX) -t check $(PASS)

test-unit: $(TOOLS) ## The tests that need neither torch nor the network
	@$(NOX) -s unit $(PASS)

test-smoke: $(TOOLS) ## The fastest spec alone: a tiny model learns shipped stories
	@$(NOX) -s tier2 -- tests/tier2/specs -m smoke $(ARGS)

test-e2e-workflow: $(TOOLS) ## Tier 1: the whole workflow on the fake backend
	@$(NOX) -s tier1 $(PASS)

test-e2e-real-model: $(TOOLS) ## Tier 2: a real small model (FT_TEST_MODEL=gpt2 picks another; FT_REAL_MODEL_ENABLE=0: off)
	@$(NOX) -s tier2 $(PASS)

test-e2e-gguf: $(TOOLS) ## Tier 3, GGUF: converted, quantized, run by llama.cpp in process and as a server
	@$(NOX) -s tier3-gguf $(PASS)

test-e2e-mlx: $(TOOLS) ## Tier 3, MLX: converted, quantized, run, trained (FT_E2E_MODEL_ID=ID picks another model)
	@$(NOX) -s tier3-mlx $(PASS)

test-e2e-ollama: $(TOOLS) ## Tier 3, Ollama (ARGS='--require ollama' makes a missing server a failure)
	@$(NOX) -s tier3-ollama $(PASS)

test-browser: $(TOOLS) ## The HTML report in a real browser; screenshots in reports/screenshots
	@$(NOX) -s browser $(PASS)

faults: $(TOOLS) ## Break what is under a run: kills, signals, full disks, damaged files; a few of each kind
	@$(NOX) -s faults $(PASS)

faults-all: $(TOOLS) ## All faults, those of real weights too; writes docs/faults.md (half an hour)
	@$(NOX) -s faults-all $(PASS)

test-e2e-quick: $(TOOLS) ## Tiers 1 and 2
	@$(NOX) -t quick $(PASS)

test-e2e-all: $(TOOLS) ## Every tier
	@$(NOX) -t e2e $(PASS)

lint: $(TOOLS) ## Style, types, workflows, generated docs
	@$(NOX) -s lint

format: $(TOOLS) ## Rewrite the source in the project's style
	@$(NOX) -s format

docs: $(TOOLS) ## Write the generated docs
	@$(NOX) -s docs $(PASS)

bench: $(TOOLS) ## The same job with TRL's command line and with finetune
	@$(NOX) -s bench $(PASS)

sabotage: $(TOOLS) ## Break the pipeline in every known way and see which checks say so; writes docs/detection.md
	@$(NOX) -s sabotage $(PASS)

nox: $(TOOLS) ## Any session: make nox ARGS='-s tier1-on-3.12'
	@$(NOX) $(ARGS)

clean: ## Remove environments, caches and reports (runs/ stays)
	rm -rf .tools .nox reports build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# nox and, where it can be had, uv (faster, and it can leave GPU packages out) in a private folder.
$(TOOLS):
	@set -e; found=''; bare=''; \
	for name in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	  "$$name" -c 'import venv, ensurepip' >/dev/null 2>&1 || { bare="$$name"; continue; }; \
	  found="$$name"; break; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	  echo "make: $$bare has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 3; fi; \
	if [ -z "$$found" ]; then \
	  echo "make: no Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 3; fi; \
	echo "Setting up nox in .tools with $$found" >&2; \
	rm -rf .tools; "$$found" -m venv .tools; \
	.tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nox; \
	.tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv \
	  || echo "uv cannot be had here; going on with pip" >&2; \
	touch $@
