# `make check` while working, `make test` before handing over; CONTRIBUTING.md says what each target is.

export HAWSER_CACHE ?= $(HOME)/.cache/hawser

install = @tests/support/install

# What `make test` runs, in this order: what fails soonest comes first.
TIERS = check deny chart fuzz csi server verify peers standalone api kernel e2e

.PHONY: test demo sanity figures bench bench-attach growth $(TIERS)

test:
	@tests/support/tiers $(TIERS)

check:
	$(install) build
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo test --locked --lib --bins

# The advisories' database is not in any registry of packages; see tests/support/tiers.
deny:
	$(install) deny
	$(HAWSER_CACHE)/bin/cargo-deny --locked check bans licenses sources

# The Helm chart: rendered, compared, and held against what the API server takes.
chart:
	$(install) chart
	cargo test --locked --test chart

fuzz:
	$(install) build
	tests/fuzz/run

csi server standalone:
	$(install) build
	cargo test --locked --test $@

peers kernel:
	$(install) $@
	cargo test --locked --test $@

# Its servers mostly wait, for what comes too late or never.
verify:
	$(install) verify
	cargo test --locked --test verify -- --test-threads=6

# The controller against a real API server alone: the agent and the kubelet are played.
api:
	$(install) e2e
	cargo test --locked --test api

# A real cluster, in namespaces of its own; as root.
e2e:
	$(install) e2e
	cargo test --locked --test cluster

# A part of the kernel tier, for its volumes are on kernel devices.
sanity:
	$(install) kernel
	cargo test --locked --test kernel -- sanity::

# Prints what the promises about size and start-up come to here; asserts nothing about time.
figures:
	$(install) build
	cargo bench --locked --bench figures

# The server beside nbdkit and qemu-nbd, in some minutes. ARGS=--full takes an hour; see docs/performance.md.
bench:
	$(install) bench
	cargo bench --locked --bench servers -- $(ARGS)

# Hawser's kernel device beside nbd-client's, in some minutes. ARGS=--settings tries the device's settings instead.
bench-attach:
	$(install) bench kernel
	cargo bench --locked --bench attach -- $(ARGS)

# The control plane with 1 to 3000 volumes, on a real API server, in ten minutes.
growth:
	$(install) e2e
	cargo bench --locked --bench growth -- $(ARGS)

demo:
	$(install) demo
	cargo run --locked --quiet -- demo
