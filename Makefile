# Everything a developer runs. `make demo` and `make test` install what is missing, on Debian 12 with a Rust toolchain.

SHELL := /bin/bash
CARGO ?= cargo
# Short, since Unix sockets live below it; two checkouts side by side need two of each.
LAB_DIR ?= /tmp/rbd-offload-lab
LAB_BASE ?= 24000
export LAB_DIR LAB_BASE

.PHONY: build release deps deb rpm container lab-up lab-down demo check fuzz test test-long test-packages test-container \
	test-nova test-tempest test-modern test-versions bench lint clean

build: deps
	$(CARGO) build --locked

release: deps
	$(CARGO) build --locked --release

# What packages are made of lies in target/, wherever other builds go.
deb rpm container test-packages test-container: export CARGO_TARGET_DIR = $(CURDIR)/target

# the packages, in target/debian and target/generate-rpm
deb: release
	packaging/tools cargo-deb
	packaging/prepare target/release/rbd-offload
	$(CARGO) deb --locked --no-build
	packaging/integrations deb

rpm: release
	packaging/tools cargo-generate-rpm
	packaging/prepare target/release/rbd-offload
	$(CARGO) generate-rpm
	packaging/integrations rpm

# headers and libraries that the build links; elsewhere than on Debian docs/how-to/install.md names them
deps:
	@! command -v apt-get >/dev/null || lab/lib/install-packages librados-dev librbd-dev libradospp-dev pkg-config g++

lab-up:
	RBDLAB_BASE=$(LAB_BASE) lab/up $(LAB_DIR)

lab-down:
	lab/down --wipe $(LAB_DIR)

demo:
	lab/demo

# what needs neither a lab nor root: `make lint`, the tests that run by themselves, advisories
check: lint
	RBD_OFFLOAD_SIMULATION_SEEDS=100 $(CARGO) test --locked --lib --test captures --test documents --test fuzz \
		--test handover_model --test integrations
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny check advisories; \
	else echo "cargo-deny is not installed, so advisories were not looked for: cargo install cargo-deny"; fi

# hostile input, a million times for each reader; `make check` does it 1,500 times
FUZZ_CASES ?= 1000000
fuzz: deps
	PROPTEST_CASES=$(FUZZ_CASES) $(CARGO) test --locked --profile fuzz --test fuzz
	PROPTEST_CASES=$$(($(FUZZ_CASES) / 100)) $(CARGO) test --locked --profile fuzz --lib breaks_it

# every test, against a lab of its own; says how long that takes; ends with the test runner's summary
test:
	tests/run

# many rounds of what a seed decides; not part of `make test`. Says how long it takes
test-long:
	tests/run --long

# the packages: what is in them, and the deb under a real systemd, against a lab of its own; not part of `make test`
test-packages: deb rpm
	packaging/test

# the container image, in target/container; as root
container: deb
	packaging/container/build

# runs it beside a lab of its own, without a container engine; as root
test-container: container
	packaging/container/test

# those that need Nova, against a lab with Nova; as root
test-nova:
	tests/run --nova

# OpenStack's Tempest on a lab with Nova, with stock and with rbd-offload, and what differs; as root
test-tempest:
	tests/tempest/run

# every test on the Ceph, the RabbitMQ and the compiler of newer Debian releases, in trees of them; as root
test-modern:
	tests/modern trixie
	tests/modern forky

# the integrations, and the daemon's calls on Glance, in the OpenStack releases 2024.1 to 2026.2; installs them from PyPI
test-versions:
	@! command -v apt-get >/dev/null || lab/lib/install-packages python3-venv python3-rados python3-rbd python3-libvirt
	integrations/test-versions

bench:
	benches/run

lint: deps
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --lib
	@command -v shellcheck >/dev/null || lab/lib/install-packages shellcheck
	shellcheck -x lab/up lab/nova-up lab/down lab/env lab/logs lab/svc lab/demo lab/lib/*.sh lab/lib/debian-mirror lab/nova/own-libvirt \
		tests/run tests/modern tests/packages tests/tempest/run dev/picture benches/run .ci/run packaging/integrations packaging/prepare packaging/test packaging/tools packaging/deb/* packaging/rpm/* \
		packaging/container/build packaging/container/healthcheck packaging/container/test lint/words
	lint/words
	lint/imports
	@if command -v typos >/dev/null; then typos; else echo "typos is not installed: cargo install typos-cli"; fi
	@if command -v cargo-deny >/dev/null; then \
		$(CARGO) fetch --locked --quiet && $(CARGO) deny --offline check licenses bans sources; \
	else echo "cargo-deny is not installed: cargo install cargo-deny"; fi

clean:
	$(CARGO) clean
