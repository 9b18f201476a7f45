# make demo       a language model into the store, compressed, run from there, and compared
# make test       build, and run every test, those of the Python package with NumPy alone
# make test-s3    the tests of stores, with the stores on an S3 server
# make test-frameworks   the same for PyTorch, transformers, peft and llama.cpp
# make wheel      the Python package as a wheel that needs no Rust
# make power      losses of power, simulated from what the built binary does to files
# make scale      a large checkpoint imported, killed meanwhile, and what it took
# make campaign   kills, damage, full disks and crowds against the built binary
# Each does its own set-up in .venv; see CONTRIBUTING.md for the rest.

PYTHON ?= python3
CARGO ?= cargo
VENV ?= .venv
BIN := $(VENV)/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)

# Lance's build needs protoc: the one on the path, else the one in the virtual environment.
export PROTOC ?= $(or $(shell command -v protoc 2>/dev/null),$(abspath $(BIN)/protoc))

.PHONY: demo demo-minilm compare test test-s3 python test-frameworks wheel campaign power scale fuzz fuzz-core mutations lint bench check-kernels doc clean

demo: $(VENV)/.ready
	$(CARGO) build --lib --bins --examples
	scripts/demo.sh $(TARGET)/debug $(BIN)/python

# A text encoder, all-MiniLM-L6-v2, in three ways; it leaves what `make compare` and some benchmarks use.
demo-minilm: $(VENV)/.ready
	$(CARGO) build --lib --bins --examples
	scripts/demo_minilm.sh $(TARGET)/debug $(BIN)/python

# MiniLM under other rules, as docs/settings.md has it: make compare RULES="a.toml b.toml"
RULES ?= $(wildcard examples/rules/minilm-*.toml)
compare: $(VENV)/.ready
	$(CARGO) build --lib --bins --examples
	$(BIN)/python scripts/compare_rules.py $(TARGET)/debug $(RULES)

# Demo and tests build the same profile with the same features, so dependencies compile once.
test: python
	$(CARGO) test
	scripts/notebook_check.sh $(TARGET)/debug $(BIN)/python
	PYTHONPATH=python $(BIN)/python -m pytest -q tests/python
	MYPYPATH=python $(BIN)/python -m mypy --strict python/layerstore/__init__.py python/layerstore/_native.pyi
	PYTHONPATH=python MYPYPATH=python $(BIN)/python -m mypy.stubtest layerstore._native

# The Python package in place: PYTHONPATH=python finds it.
python: $(VENV)/.ready
	$(CARGO) build --lib --bins --examples
	ln -sf $(abspath $(TARGET)/debug/lib_native.so) python/layerstore/_native.abi3.so

# Optimised, which compiles all dependencies once more; the wheel is in dist, and was tried in an environment of its own.
wheel: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "maturin>=1.9.4,<2"
	$(BIN)/maturin build --release --manifest-path python/Cargo.toml --out dist
	scripts/wheel_check.sh dist $(PYTHON)

# Exports held to the programs that they are for, in an environment of its own: torch, transformers, peft, llama.cpp.
FRAMEWORKS ?= $(VENV)-frameworks
test-frameworks: python $(FRAMEWORKS)/.ready
	$(CARGO) build --manifest-path fuzz/campaign/Cargo.toml --target-dir $(TARGET)/campaign --bin s3-server
	LAYERSTORE_S3_SERVER=$(TARGET)/campaign/debug/s3-server KERAS_BACKEND=torch PYTHONPATH=python $(FRAMEWORKS)/bin/python -m pytest -q tests/frameworks
	KERAS_BACKEND=jax PYTHONPATH=python $(FRAMEWORKS)/bin/python -m pytest -q tests/frameworks/test_keras.py
	$(FRAMEWORKS)/bin/python tests/frameworks/formats.py $(TARGET)/debug
	$(FRAMEWORKS)/bin/python tests/frameworks/models.py $(TARGET)/debug

# The tests of stores once more, with all of them on the S3 server of the tests; those that are about local files are named in a list
S3_PORT ?= 9321
S3_TESTS = LAYERSTORE_TESTS_ON_S3=$(S3_PORT) AWS_ENDPOINT_URL=http://127.0.0.1:$(S3_PORT) AWS_REGION=us-east-1 \
	AWS_ACCESS_KEY_ID=layerstore-test-key AWS_SECRET_ACCESS_KEY=layerstore-test-secret
test-s3: $(VENV)/.ready
	$(S3_TESTS) $(CARGO) test --test all -- --exact $$(grep -v '^#' tests/all/on_disk.txt | sed 's/ .*//; s/^/--skip /')

# Faults against the built binary, with other options or for longer: make campaign CAMPAIGN="--only kill --minutes 30"
CAMPAIGN ?=
CAMPAIGN_RUN = $(TARGET)/campaign/debug/layerstore-campaign --binary $(TARGET)/debug/layerstore --keep $(TARGET)/campaign/failures
campaign: campaign-built
	$(CAMPAIGN_RUN) $(CAMPAIGN)

# Losses of power alone, many of them; another seed, or fewer: make power POWER="--losses 300 --seed 2"
POWER ?= --losses 10000
power: campaign-built
	$(CAMPAIGN_RUN) --only power $(POWER)

# A sparse checkpoint, imported whole, again, and with kills: make scale SCALE="--gib 30 --shards 8 --kills 5"
SCALE ?= --gib 2 --shards 4 --kills 3
scale: $(VENV)/.ready
	$(CARGO) build --bin layerstore
	$(BIN)/python scripts/import_scale.py $(TARGET)/debug/layerstore $(SCALE)

.PHONY: campaign-built
campaign-built: $(VENV)/.ready
	$(CARGO) build --bin layerstore
	$(CARGO) build --manifest-path fuzz/campaign/Cargo.toml --target-dir $(TARGET)/campaign

# Each fuzz target for a number of runs, with cargo-fuzz on the stable toolchain; fuzz-core is the one that needs no Lance.
FUZZ ?= rules checkpoint formats keras store
FUZZ_RUNS ?= 1000000
FUZZ_RUN = RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --sanitizer none --dev
fuzz-core:
	$(FUZZ_RUN) --fuzz-dir fuzz/core layer_from_parts -- -runs=$(FUZZ_RUNS)

fuzz: fuzz-core $(VENV)/.ready
	mkdir -p fuzz/corpus/checkpoint fuzz/corpus/rules
	cp tests/fixtures/keras/*.safetensors fuzz/corpus/checkpoint
	cp tests/fixtures/*.toml examples/rules/*.toml fuzz/corpus/rules
	set -e; for target in $(FUZZ); do $(FUZZ_RUN) $$target -- -runs=$(FUZZ_RUNS); done

# The harnesses of the fuzz targets over other changes than those of the tests, without coverage: make mutations SEEDS=1000..9000
SEEDS ?= 0..100000
MUTATIONS ?= mutations
mutations: $(VENV)/.ready
	LAYERSTORE_SEEDS=$(SEEDS) $(CARGO) test --test all $(MUTATIONS)
	LAYERSTORE_SEEDS=$(SEEDS) $(CARGO) test -p layerstore-core --test parts

lint: $(VENV)/.ready
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

# Peers are built by themselves: nothing else depends on them.
bench: $(VENV)/.ready
	$(CARGO) build --release --manifest-path benches/peers/Cargo.toml --target-dir $(TARGET)/peers
	LAYERSTORE_PEERS=$(abspath $(TARGET)/peers/release/peers) $(CARGO) bench

# That the kernels' loops call nothing under any of three profiles; with KERNELS=--speed, that all three are about as fast.
KERNELS ?=
check-kernels:
	CARGO=$(CARGO) $(PYTHON) scripts/check_kernels.py $(KERNELS)

doc: $(VENV)/.ready
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

$(VENV)/.ready: examples/notebooks/requirements.txt scripts/requirements-build.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r scripts/requirements-build.txt -r examples/notebooks/requirements.txt
	touch $@

$(FRAMEWORKS)/.ready: tests/frameworks/requirements.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/frameworks/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-frameworks demo
	$(CARGO) clean
