# GNU make. The library alone is built by c_src/Makefile, which is plainer.

NATIVE := native
LIBS := $(CURDIR)/_build/default/lib
EBIN := $(LIBS)/erllama_cache_nif/ebin

# rustup installs cargo where a shell that is not a login shell does not look.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

# Erlang and Elixir take the encoding of file names and output from the locale, and where none is set,
# as in most containers, that is Latin-1 or ASCII.
ifeq ($(LC_ALL)$(LC_CTYPE)$(LANG),)
export LC_ALL := C.UTF-8
endif

# One target directory for all of cargo's work, whatever the user has set: c_src/Makefile uses it.
export CARGO_TARGET_DIR := $(CURDIR)/$(NATIVE)/target

BENCH_LIB := $(CURDIR)/_build/bench/lib/erllama_cache_nif
export BENCH_NIF := $(CARGO_TARGET_DIR)/release/liberllama_cache_bench
BENCH := erl -noshell -pa "$(BENCH_LIB)/ebin" "$(BENCH_LIB)/bench" "$(BENCH_LIB)/examples/llm"

MUSL := x86_64-unknown-linux-musl

# The file the demo saves: make demo FILE=some/file
export FILE

.PHONY: all kvc install uninstall prebuilt package help setup demo demo-llm test test-beam elixir \
  matrix check cover loom musl soak-semaphore soak-store cluster fresh faults crash kill disks fuzz \
  soak sanitize valgrind readme rules dropin \
  chunks rustdoc bench-plots bench-semaphore bench-save bench-prefix bench-slow bench-fetch bench-host \
  bench-peers bench-llm \
  bench-build edoc clean distclean

### Build

# BUILT=yes says that all is installed and compiled, for targets that run side by side.
all: ## Compile the application and its NIF (the default)
	$(if $(BUILT),@:,rebar3 compile)

kvc: ## Build kvc, the command-line tool for directories of saved states
	cd $(NATIVE) && cargo build --locked --release -p kvc
	@echo "$(CARGO_TARGET_DIR)/release/kvc"

# Below PREFIX, or below DESTDIR first, as packagers expect.
PREFIX := /usr/local
COMPLETIONS := bash:bash-completion/completions/kvc zsh:zsh/site-functions/_kvc \
  fish:fish/vendor_completions.d/kvc.fish
install_dir = $(DESTDIR)$(PREFIX)
share_dir = $(install_dir)/share

install: $(if $(BUILT),,kvc) ## Install kvc, its manual pages and completions: PREFIX=/usr/local
	umask 022 && mkdir -p "$(install_dir)/bin" "$(share_dir)/man/man1"
	install -m 755 "$(CARGO_TARGET_DIR)/release/kvc" "$(install_dir)/bin/kvc"
	umask 022 && "$(install_dir)/bin/kvc" man "$(share_dir)/man/man1"
	umask 022 $(foreach it,$(COMPLETIONS),&& mkdir -p "$(share_dir)/$(dir $(word 2,$(subst :, ,$(it))))" \
	  && "$(install_dir)/bin/kvc" completions $(word 1,$(subst :, ,$(it))) \
	    >"$(share_dir)/$(word 2,$(subst :, ,$(it)))")

uninstall: ## Remove what `make install` has installed
	rm -f "$(install_dir)/bin/kvc" "$(share_dir)"/man/man1/kvc.1 "$(share_dir)"/man/man1/kvc-*.1 \
	  $(foreach it,$(COMPLETIONS),"$(share_dir)/$(word 2,$(subst :, ,$(it)))")

demo: setup all ## Save a file into a cache and watch it happen: FILE=path
	ERL_LIBS="$(LIBS)$${ERL_LIBS:+:$$ERL_LIBS}" escript examples/demo.escript $${FILE:+"$$FILE"}

demo-llm: setup all ## A real model's prompt, read once: TOKENS=2000 (fetches 400 MB)
	examples/llm/demo.sh

prebuilt: setup ## Build the archives of a release: TARGETS="x86_64-unknown-linux-gnu"
	tools/prebuilt.sh $(TARGETS)

package: setup all ## Build from what the package has, in an empty directory
	tools/package.sh

setup: ## Install what is missing, or say what it is
	@$(if $(BUILT),:,tools/setup.sh)

# EDoc succeeds whatever it warns of.
strict = out=$$($(1) 2>&1); status=$$?; printf '%s\n' "$$out"; \
  [ $$status -eq 0 ] && ! printf '%s\n' "$$out" | grep -qi warning

edoc: ## Write the API documentation to doc/
	@$(call strict,rebar3 edoc)

chunks: all ## Write what h/1,2,3 of the shell show
	@$(call strict,rebar3 as chunks edoc)
	erl -noinput -pa "$(EBIN)" -eval \
	  '{ok, Docs} = code:get_doc(erllama_cache_writer), [_ | _] = shell_docs:render(erllama_cache_writer, save, 4, Docs), halt(0).'

rustdoc: ## Write the reference of the Rust crates to native/target/doc
	cd $(NATIVE) && RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --workspace

clean: ## Remove what was compiled, but keep cargo's cache
	rm -rf _build/*/lib/erllama_cache_nif priv/erllama_cache_nif.so

distclean: ## Remove everything that was built
	$(MAKE) -C c_src clean
	rm -rf _build doc

help: ## List the targets
	@awk -F ':.*## ' '/^### / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

### Test

# The NIF crates have no tests of their own: outside a VM they do not link. Erlang tests them.
test: setup ## Run all tests: Rust, EUnit, Common Test, Elixir
	cd $(NATIVE) && cargo test --locked -p erllama_cache_core -p kvc
	$(MAKE) test-beam

# SUITES=test/a_SUITE,test/b_SUITE: of Common Test only these.
test-beam: ## Run those of them that need Erlang or Elixir
	rebar3 as check compile
	rebar3 eunit $(COVER)
	rebar3 ct $(COVER) $(if $(SUITES),--suite $(SUITES))
	rebar3 compile
	ELIXIR_ERL_OPTIONS="+fnu" elixir -pa "$(EBIN)" test/elixir_check.exs
	$(MAKE) elixir

# A store's directory has to be there before the store is.
elixir: ## Run the tests of the example in Elixir
	root=$$(mktemp -d) && trap 'rm -rf "$$root"' EXIT && cd examples/elixir_kv && \
	  mix format --check-formatted && KV_ROOT="$$root" MIX_REBAR3="$$(command -v rebar3)" \
	  ELIXIR_ERL_OPTIONS="+fnu" mix test --warnings-as-errors

# SYSTEMS=aarch64-apple-darwin: of the other systems only these.
check: setup ## Formatting, lints, warnings, xref, dialyzer, documentation, licences, shape
	cd $(NATIVE) && cargo fmt --all --check
	cd $(NATIVE) && cargo clippy --locked --workspace --all-targets -- -D warnings
	tools/targets.sh $(SYSTEMS)
	tools/deny.sh
	rebar3 as check compile
	rebar3 xref
	rebar3 as check dialyzer
	$(MAKE) edoc chunks rustdoc
	escript tools/shape.escript

# COVER=--cover make test, then rebar3 cover: the same beside the other tests.
cover: setup ## Run the Erlang tests with coverage; the report is in _build/test/cover
	rebar3 do eunit --cover, ct --cover, cover --verbose

rules: ## Check the alert rules of dashboards/ with promtool
	tools/rules.sh

readme: setup all ## Run the commands that the pages show, in a clean copy
	tools/readme.sh

### Prove: proofs/README.md says what

loom: setup ## Every interleaving of the semaphore and of the sync that saves share
	cd $(NATIVE) && RUSTFLAGS="--cfg loom" cargo test --locked --release -p erllama_cache_core \
	  --test loom_semaphore --target-dir target/loom
	cd $(NATIVE) && RUSTFLAGS="--cfg loom" cargo test --locked --release -p erllama_cache_core \
	  --lib --target-dir target/loom files::sync_group::models

# Against the configuration, which asks for libraries that can be loaded (native/.cargo/config.toml).
musl: setup ## The tests of the core and of kvc, linked statically with musl
	tools/setup.sh musl-gcc target:$(MUSL)
	cd $(NATIVE) && RUSTFLAGS="-C target-feature=+crt-static" cargo test --locked \
	  -p erllama_cache_core -p kvc --target $(MUSL) --target-dir target/musl

cluster: setup all ## Share a root on GlusterFS while parts of it fail, as root: CLUSTER_KEYS=40
	proofs/cluster/run.sh

fresh: ## From a clone to passing tests on bare Debian roots, as root: RELEASES=trixie
	proofs/fresh/run.sh $(RELEASES)

matrix: setup ## The Erlang and Elixir tests on other OTP releases, as root: RELEASES=forky
	proofs/matrix/run.sh $(RELEASES)

dropin: setup all ## Put it into a project that stands in for erllama, and take it out again
	proofs/dropin/run.sh

soak-semaphore: setup ## The semaphore's state machine: PROPER_SEQUENCES=50000
	PROPER_SEQUENCES=$${PROPER_SEQUENCES:-50000} rebar3 eunit --module=prop_semaphore_tests

soak-store: setup ## The store's state machine: PROPER_SEQUENCES=10000
	PROPER_SEQUENCES=$${PROPER_SEQUENCES:-10000} rebar3 eunit --module=prop_store_tests

faults: setup all ## Fail each I/O call once, end the VM at each one: FAULTS=quick does less
	proofs/faults/run.sh

crash: setup all ## Cut the power of machines that save: CUTS=100 SAVES=25
	proofs/crash/run.sh

kill: setup all ## Kill nodes in the middle of saves: KILLS=300 in each of four storms
	proofs/kill/run.sh

disks: setup all ## Full, frozen and read-only disks, other file systems, as root
	proofs/disks/run.sh

fuzz: setup ## Feed made-up bytes to what reads files: FUZZ_RUNS= FUZZ_SECONDS=600
	proofs/fuzz/run.sh

soak: setup all ## Use a store in every way at once: SOAK=3600 seconds
	proofs/soak/run.sh

sanitize: setup ## Run the tests under sanitizers: SANITIZERS="thread address nif"
	proofs/sanitize/run.sh $(SANITIZERS)

valgrind: setup ## Run the Erlang tests in a VM under memcheck
	proofs/sanitize/run.sh valgrind

# What is preloaded: into a VM, to make calls of the NIF library fail or slow; into a guest kernel.
_build/iofault.so: proofs/faults/iofault.c
_build/linger.so: proofs/crash/linger.c
_build/xstate.so: proofs/crash/xstate.c
_build/%.so:
	mkdir -p _build
	$(CC) -std=gnu11 -O1 -Wall -Wextra -Werror -U_FORTIFY_SOURCE -fPIC -shared -o $@ $< -ldl

### Measure

bench-semaphore: setup bench-build ## The semaphore beside a plain Erlang one and the floors
	$(BENCH) -s bench_semaphore main

bench-save: setup bench-build ## Saves and loads beside the bare floor and the plain Erlang way
	bench/disk.sh --others $(BENCH) -s bench_save main

bench-prefix: setup bench-build ## The longest stored prefix of a prompt, among 100,000 files
	$(BENCH) -s bench_prefix main

bench-slow: setup bench-build _build/iofault.so ## What another process waits for beside a slow disk
	IOFAULT_SYNC_MS=30 IOFAULT_READ_MS=20 LD_PRELOAD=$(CURDIR)/_build/iofault.so \
	  $(BENCH) -s bench_slow main

bench-fetch: setup bench-build ## What it costs to take a state from another node
	bench/disk.sh $(BENCH) -s bench_fetch main

bench-host: setup bench-build ## A model's tokens in a host while its state is saved and loaded
	bench/disk.sh $(BENCH) -s bench_host main

bench-peers: setup bench-build ## A real model's state beside llama.cpp's own files and others
	examples/llm/fetch.sh bench/peers/setup.sh bench/disk.sh $(BENCH) -s bench_peers main

bench-llm: setup bench-build kvc ## A real model's time to its first token, by the prompt's length
	KVC="$(CARGO_TARGET_DIR)/release/kvc" examples/llm/fetch.sh bench/disk.sh $(BENCH) -s bench_llm main

bench-plots: ## Write pictures and tables of the pages from what those have measured
	bench/plots.sh

bench-build:
	cd $(NATIVE) && cargo build --locked --release -p erllama_cache_bench
	rebar3 as bench compile
