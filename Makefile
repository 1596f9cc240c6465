# GNU make. The library alone is built by c_src/Makefile, which is plainer.

NATIVE := native
LIBS := $(CURDIR)/_build/default/lib
EBIN := $(LIBS)/erllama_cache_nif/ebin

# rustup installs cargo where a shell that is not a login shell does not look.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

# One target directory for all of cargo's work, whatever the user has set: c_src/Makefile uses it.
export CARGO_TARGET_DIR := $(CURDIR)/$(NATIVE)/target

# The file the demo saves: make demo FILE=some/file
export FILE

.PHONY: all help setup demo test check cover edoc clean distclean

all: ## Compile the application and its NIF (the default)
	rebar3 compile

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Install what is missing (apt), or say what is
	@tools/setup.sh

demo: setup all ## Save a file into a cache, watch it happen: make demo [FILE=path]
	ERL_LIBS="$(LIBS)$${ERL_LIBS:+:$$ERL_LIBS}" escript examples/demo.escript $${FILE:+"$$FILE"}

# The NIF crate has no tests of its own: outside a VM it does not link. Erlang tests it.
test: setup ## Run all tests: Rust, EUnit, Common Test, Elixir
	cd $(NATIVE) && cargo test --locked --workspace --exclude erllama_cache_nif
	rebar3 eunit
	rebar3 ct
	rebar3 compile
	ELIXIR_ERL_OPTIONS="+fnu" elixir -pa "$(EBIN)" test/elixir_check.exs

check: setup ## Formatting, lints, warnings as errors, xref, dialyzer
	cd $(NATIVE) && cargo fmt --all --check
	cd $(NATIVE) && cargo clippy --locked --workspace --all-targets -- -D warnings
	rebar3 as check compile
	rebar3 xref
	rebar3 as check dialyzer

cover: ## Run the Erlang tests with coverage, report in _build/test/cover
	rebar3 do eunit --cover, ct --cover, cover --verbose

edoc: ## Write the API documentation to doc/
	rebar3 edoc

clean: ## Remove what was compiled, but keep cargo's cache
	rm -rf _build/*/lib/erllama_cache_nif priv/erllama_cache_nif.so

distclean: ## Remove everything that was built
	$(MAKE) -C c_src clean
	rm -rf _build doc
