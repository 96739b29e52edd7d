# The door to the project: `make help` lists the targets; CI uses the same ones.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export VIRTUAL_ENV := $(abspath $(VENV))
export CARGO_TERM_COLOR ?= never

.PHONY: help baseline build build-torch test test-rust test-python test-torch test-full test-faults test-faults-long test-faults-times test-isa test-asan test-valgrind fuzz bench bench-gpu lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

baseline: ## the baseline experiment on the shipped data
	cargo run --release

$(VENV)/.locked: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $@

build: $(VENV)/.locked ## virtual environment and the Python module, built from this tree
	rm -f python/moe_lab/*.so
	$(BIN)/maturin develop --release --quiet

# Binary and module are built as one set of packages, so that both are made of the same compiled crates.
PACKAGES := --package train --package bindings

# torch-sys asks the `python` of VIRTUAL_ENV for its libraries. A target folder of its own: features change what is compiled.
build-torch test-torch bench-gpu: export LIBTORCH_USE_PYTORCH = 1
build-torch test-torch bench-gpu: export PATH := $(abspath $(BIN)):$(PATH)
build-torch test-torch bench-gpu: export CARGO_TARGET_DIR := $(abspath target/torch)

$(VENV)/.torch: $(VENV)/.locked
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.11.0
	touch $@

build-torch: $(VENV)/.torch ## binary (.venv/bin/moe-lab) and Python module with the torch engine (installs torch, several GB)
	rm -f python/moe_lab/*.so
	cargo build --release $(PACKAGES) --features torch
	install target/torch/release/moe-lab $(BIN)/moe-lab-torch
	install crates/train/launch.sh $(BIN)/moe-lab
	$(BIN)/maturin develop --release --quiet --features torch

test: test-rust test-python ## everything that needs neither torch nor much time

test-rust:
	cargo test --release --workspace

test-python: build
	$(BIN)/python -m pytest -q

test-torch: build-torch ## the PyTorch oracle and the torch engine: logits, losses and every gradient
	cargo test --release $(PACKAGES) --features torch --test torch -- --include-ignored
	$(BIN)/python -m pytest -q -m "torch and not full" tests

test-full: build ## the slow tests: full training runs, a context of 16,384 tokens, stage 1, Shakespeare, the whole oracle grid where torch is in
	cargo test --release $(PACKAGES) --test long_context -- --ignored --nocapture
	$(BIN)/python -m pytest -q -m full tests

bench: $(VENV)/.locked ## our training step beside PyTorch's, at most 10 minutes (installs torch, several GB); ARGS=--quick, --sweep, --recipe …
	cargo build --release $(PACKAGES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 psutil==7.2.2
	$(BIN)/python benches/compare.py $(ARGS)

# Adds up the lines `faults: <what> injected=<n> kills=<n> wrong=<n>` of the fault tests; fails below so many faults and kills.
# The packages of the binary and the module together, as everywhere: what they need is then compiled once.
FAULTS = cargo test --release $(PACKAGES) --lib --test faults --
TALLY = awk -v least=$(1) -v kills=$(2) ' \
	function number(name) { return match($$0, name "=[0-9]+") ? substr($$0, RSTART + length(name) + 1, RLENGTH - length(name) - 1) : 0 } \
	/faults: / { n += number("injected"); k += number("kills"); w += number("wrong") } /SKIPPED/ { s++ } { print } \
	END { printf "%d faults injected, %d of them real kills: %d lost or wrong; %d skipped\n", n, k, w, s; exit n < least || k < kills || w > 0 }'

test-faults: ## injected faults: disks, power cuts, damage, kills, numbers (a part of the default tests)
	set -o pipefail; $(FAULTS) --nocapture 2>&1 | $(call TALLY,500,20)

test-faults-long: ## the same at every operation and thousands of times: at least 2,000 faults and 200 kills, some minutes
	set -o pipefail; $(FAULTS) --include-ignored --nocapture --skip sizes:: 2>&1 | $(call TALLY,2000,200)

test-faults-times: ## how long recovery takes and what saving costs, measured: nothing else should run
	cargo test --release -p train --test faults -- --ignored --nocapture --test-threads=1 sizes::

# The tests themselves say what the machine has: the refusal of a set without a name lists the others.
ISA_SETS := portable avx2 avx512 avx512bf16 amx
ISA_TEST := cargo test --release -p tensor --lib --

test-isa: ## the parity tests once for every instruction set that this machine has
	cargo test --release -p tensor --lib --no-run
	@has=$$(MOE_LAB_ISA=none $(ISA_TEST) a_row_of_zeros 2>&1 | sed -n 's/.*this machine has \(.*\); unset it.*/\1/p' | head -1); \
	[ -n "$$has" ] || { echo "test-isa: the tests did not say which instruction sets this machine has"; exit 1; }; \
	for set in $(ISA_SETS); do \
		case ", $$has," in \
			*", $$set,"*) echo "== $$set"; MOE_LAB_ISA=$$set $(ISA_TEST) kernels ops || exit 1;; \
			*) echo "== $$set: skipped, this machine has $$has";; \
		esac; \
	done

# Nightly switches of the stable compiler, for this target alone.
HOST := $(shell rustc -vV | sed -n 's/^host: //p')

test-asan: ## the unsafe kernels under AddressSanitizer
	@[ "$$(uname -s)" = Linux ] || { echo "test-asan needs Linux: the sanitizer of the Rust compiler is used there"; exit 1; }
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" CARGO_TARGET_DIR=target/asan \
		cargo test --release --target $(HOST) -p tensor --lib kernels

test-valgrind: ## the unsafe kernels under valgrind, on the instruction set that it knows (AVX2)
	@command -v valgrind > /dev/null || { echo "test-valgrind needs valgrind: install the package valgrind of your system"; exit 1; }
	cargo test --release -p tensor --lib --no-run
	MOE_LAB_ISA=avx2 RAYON_NUM_THREADS=2 PROPTEST_CASES=4 valgrind --error-exitcode=9 --quiet \
		$$(ls -t target/release/deps/tensor-* | grep -v '\.d$$' | head -1) kernels --test-threads=1

FUZZ_RUNS ?= 2000000
FUZZ_SECONDS ?= 600
FUZZ_DIRECTORIES ?= 100000

fuzz: ## fuzz every parser (FUZZ_RUNS or FUZZ_SECONDS each) and run directories (FUZZ_DIRECTORIES); needs cargo-fuzz
	@cargo fuzz --version > /dev/null 2>&1 || { echo "fuzz needs cargo-fuzz: cargo install cargo-fuzz"; exit 1; }
	fuzz/run $(FUZZ_RUNS) $(FUZZ_SECONDS) $(FUZZ_DIRECTORIES)

bench-gpu: build-torch ## our step under the torch engine beside PyTorch's on a GPU; says how to go to one where there is none; ARGS=--cases medium …
	$(BIN)/python benches/gpu.py $(ARGS)

lint: $(VENV)/.locked ## formatters, linters, type checker
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.locked ## rewrite the sources in the project's format
	cargo fmt --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built (run directories stay)
	cargo clean
	rm -rf $(VENV) python/moe_lab/*.so
