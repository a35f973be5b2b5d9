# Everything lives in .venv; a stamp in it marks each step that is done. A stamp carries the time its
# step began and appears only when the step has ended, so an interrupted or failed one is done again.

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # one pip at a time in one environment

# Peers and tools whose tests may be skipped elsewhere, but not where `make test` has installed them.
TEST_REQUIRE := expecttest,hypothesis,matplotlib,ml_dtypes,mpmath,onnx,pandas,polars,rich,safetensors,scipy,skops,sklearn,sympy,threadpoolctl,tokenizers,torch,typer

SOURCES := pyproject.toml CMakeLists.txt $(shell find native src -type f \
	-not -path '*/__pycache__/*' -not -name '*.md')

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=python3.12 make ... chooses the Python of .venv; CXX=clang++ the compiler."

.PHONY: train
train: $(VENV)/.stamp-package ## fit a softmax layer to the digits and write a report (ARGS="fashion-mnist --force")
	@$(RUN) -m crossent train $(ARGS)

.PHONY: test
test: $(VENV)/.stamp-package $(VENV)/.stamp-test ## the test suite (ARGS="-k gradient")
	@CROSSENT_TEST_REQUIRE=$(TEST_REQUIRE) $(RUN) -m pytest $(ARGS)

.PHONY: bench
bench: $(VENV)/.stamp-package $(VENV)/.stamp-bench ## time the rows against peers and plain copies (ARGS="--shapes imagenet")
	@$(RUN) -m crossent bench rows $(ARGS)

.PHONY: lint
lint: $(VENV)/.stamp-package $(VENV)/.stamp-lint ## ruff, mypy and clang-format
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard native/*.cpp native/*.h native/tests/*.cpp native/tests/*.h)

.PHONY: clean
clean: ## remove what make has made: .venv, the build and caches (trained models stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The environment is made anew where its Python no longer runs or is not the one PYTHON asks for.
IDENTITY := -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null
HAVE := $(shell $(RUN) $(IDENTITY))
WANT := $(if $(PYTHON),$(shell $(PYTHON) $(IDENTITY)),$(HAVE))
ifneq ($(HAVE),$(or $(WANT),none))
$(VENV)/.stamp-venv: FORCE
endif
.PHONY: FORCE
FORCE:

begin = @mkdir -p $(@D) && touch $@.begun && echo "crossent: $(1)"
end = @mv $@.begun $@

$(VENV)/.stamp-venv:
	@python=$$(PYTHON="$(PYTHON)" sh tools/preflight.sh) \
	&& echo "crossent: making $(VENV) with $$($$python --version) ($$python)" \
	&& $$python -m venv $(if $(filter FORCE,$^),--clear) $(VENV)
	@rm -rf build
	$(call begin,a recent pip)
	@$(INSTALL) 'pip>=25.1'
	$(end)

$(VENV)/.stamp-build-tools: pyproject.toml $(VENV)/.stamp-venv
	$(call begin,build tools)
	@$(RUN) tools/build_requires.py >$@.txt && $(INSTALL) -r $@.txt
	@$(RUN) tools/build_requires.py >$@.txt && $(INSTALL) -r $@.txt
	$(end)

# Compared, not dated: a file that was removed or moved is a change as well.
$(VENV)/.sources: FORCE | $(VENV)/.stamp-venv
	@echo '$(sort $(SOURCES))' | cmp -s - $@ || echo '$(sort $(SOURCES))' >$@

$(VENV)/.stamp-package: $(SOURCES) $(VENV)/.sources $(VENV)/.stamp-build-tools
	$(call begin,building and installing the package (a minute or two at first))
	@$(INSTALL) --no-build-isolation --editable '.[cli]'
	$(end)

$(VENV)/.stamp-test: pyproject.toml $(VENV)/.stamp-venv | $(VENV)/.stamp-package
	$(call begin,what the tests need (PyTorch among it; this takes a while))
	@$(INSTALL) --group test
	$(end)

$(VENV)/.stamp-bench: pyproject.toml $(VENV)/.stamp-venv | $(VENV)/.stamp-package
	$(call begin,the peers of the benchmark (PyTorch and JAX; this takes a while))
	@$(INSTALL) --group bench
	$(end)

$(VENV)/.stamp-lint: pyproject.toml $(VENV)/.stamp-venv
	$(call begin,what the linters need)
	@$(INSTALL) --group lint
	$(end)

# Robustness: docs/numerics.md says what these do and what they last gave.
CHECKING := $(VENV)/.stamp-package $(VENV)/.stamp-test
CASES ?= 1000000
JOBS ?= $(shell nproc)
WITH_CMAKE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: sanitize
sanitize: $(CHECKING) ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer (ARGS="-k softmax")
	@$(WITH_CMAKE) sh tools/sanitize.sh $(ARGS)

.PHONY: tsan
tsan: $(CHECKING) ## kernels and thread pool under ThreadSanitizer
	@$(WITH_CMAKE) cmake -S native/tests -B build/tsan -DCMAKE_BUILD_TYPE=Release \
		-DCROSSENT_SANITIZE=thread >build/tsan.log
	@$(WITH_CMAKE) cmake --build build/tsan --target parallel_driver kernel_driver head_driver >>build/tsan.log
	TSAN_OPTIONS=halt_on_error=1 build/tsan/parallel_driver
	TSAN_OPTIONS=halt_on_error=1 build/tsan/kernel_driver
	TSAN_OPTIONS=halt_on_error=1 build/tsan/head_driver

.PHONY: emulate
emulate: $(CHECKING) ## the tests of the kernels with AVX-512 emulated, on a machine without (ARGS="-k softmax")
	@sh tools/emulate_v4.sh $(ARGS)

.PHONY: aarch64
aarch64: $(VENV)/.stamp-build-tools ## build for aarch64 and check it there, under QEMU elsewhere
	@$(WITH_CMAKE) sh tools/aarch64.sh

.PHONY: fuzz
fuzz: $(CHECKING) ## random calls against the exact answer (CASES=1000000)
	@$(RUN) tools/fuzz --cases $(CASES) --jobs $(JOBS) $(ARGS)

.PHONY: faults
faults: $(CHECKING) ## one-line faults, each of which a test must notice (ARGS="general.cpp")
	@$(WITH_CMAKE) $(RUN) tools/faults.py $(ARGS)
