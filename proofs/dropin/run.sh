#!/bin/sh
# Proves that docs/guide/erllama.md puts this project into erllama and takes it out again, step by
# step. Each kind of erllama is stood in for by a project with its name, its supervisor's child and,
# for its modules, those of test/fakes; it gets this one in each way that the page has:
#
#   fork     the project itself is changed
#   rebar3   a server depends on the project, and rebar3 makes a release of it
#   mix      the same, with Mix
#
# and each of them in these steps:
#
#   before   the project has an erllama_cache_writer of its own
#   in       what the page says is done: a save goes through this one, whose file an independent
#            reader finds good. A release is started for that
#   out      all of it is undone: the project's own is in use again, and the file still good
#
# Changes and commands are taken from the page. Dependencies are git ones, as there: of the project
# that stands in, and of a repository made of what is here now.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
need git rebar3 elixir
temp_dir
begun=$(date +%s)

# The release that runs, if one does.
node=
trap '[ -z "$node" ] || kill "$node" || true; rm -rf "$work"' EXIT

export DROPIN_ROOT="$work/kv"
# A node is found by its name, which no other on this machine may have.
export RELEASE_NODE="dropin_$$"
export ELIXIR_ERL_OPTIONS=+fnu MIX_ENV=prod
MIX_REBAR3=$(command -v rebar3)
export MIX_REBAR3

run() {
    quietly "$work/log" "$@"
}

commit() { # DIRECTORY
    git -C "$1" init -q
    git -C "$1" checkout -q -b main 2>/dev/null || true
    git -C "$1" add -A
    git -C "$1" -c user.name=dropin -c user.email=dropin@localhost commit -q -m 'As it is now'
}

### What there is before

# The project that stands in for erllama. Its own hook has to run, whatever is added to it.
stand_in() { # KEYED_BY DIRECTORY
    case $1 in
        tokens) version=0.5.1 macros= ;;
        text) version=0.12.0 macros=", {d, 'TEXT_KEYED'}" ;;
    esac
    mkdir -p "$2/src"
    cp "$here"/test/fakes/*.erl "$2/src/"
    printf '%s\n' "{erl_opts, [debug_info$macros]}." '{deps, []}.' \
        '{pre_hooks, [{compile, "touch hooked"}]}.' >"$2/rebar.config"
    printf '%s\n' /_build/ /hooked >"$2/.gitignore"
    cat >"$2/src/erllama.app.src" <<END
{application, erllama, [
    {description, "Stands in for erllama"},
    {vsn, "$version"},
    {registered, []},
    {mod, {erllama_app, []}},
    {env, [{writer_max_concurrent, 3}]},
    {applications, [
        kernel,
        stdlib,
        crypto
    ]}
]}.
END
    cat >"$2/src/erllama_app.erl" <<'END'
-module(erllama_app).
-behaviour(application).
-behaviour(supervisor).
-export([start/2, stop/1, init/1]).

start(_Type, _Args) ->
    ok = erllama_fake:start(tier, os:getenv("DROPIN_ROOT")),
    supervisor:start_link({local, erllama_sup}, ?MODULE, []).

stop(_State) ->
    erllama_fake:stop().

init([]) ->
    Writer = #{
        id => erllama_cache_writer,
        start => {erllama_cache_writer, start_link, []},
        restart => permanent, type => worker, shutdown => 5000
    },
    {ok, {#{}, [Writer]}}.
END
    cat >"$2/src/erllama_cache_writer.erl" <<'END'
%% What is replaced.
-module(erllama_cache_writer).
-behaviour(gen_server).
-export([start_link/0, save/4]).
-export([init/1, handle_call/3, handle_cast/2]).

start_link() -> gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).
save(_TierSrv, _Tier, _Meta, _Payload) -> {error, its_own}.
init([]) -> {ok, none}.
handle_call(_Request, _From, State) -> {reply, {error, unknown_call}, State}.
handle_cast(_Request, State) -> {noreply, State}.
END
    commit "$2"
}

# The server that depends on it, for rebar3 and for Mix.
server() { # STAND_IN DIRECTORY
    mkdir -p "$2/src"
    cp "$here/proofs/dropin/erllama_cache_dropin.erl" "$2/src/"
    printf '%s\n' /_build/ /deps/ >"$2/.gitignore"
    printf '%s\n' "-sname $RELEASE_NODE" '-setcookie dropin' >"$2/vm.args"
    cat >"$2/rebar.config" <<END
{deps, [
    {erllama, {git, "file://$1", {branch, "main"}}}
]}.
{relx, [
    {release, {server, "0.1.0"}, [server]},
    {mode, prod},
    {include_erts, false},
    {extended_start_script, true},
    {vm_args, "vm.args"}
]}.
END
    cat >"$2/src/server.app.src" <<'END'
{application, server, [
    {description, "Depends on erllama"},
    {vsn, "0.1.0"},
    {applications, [
        kernel,
        stdlib,
        erllama
    ]}
]}.
END
    cat >"$2/mix.exs" <<END
defmodule Server.MixProject do
  use Mix.Project

  def project do
    [
      app: :server,
      version: "0.1.0",
      deps: deps()
    ]
  end

  defp deps do
    [
      {:erllama, git: "file://$1", branch: "main"}
    ]
  end
end
END
}

### What the page says

# The page, with the addresses that there are here.
page_with() { # STAND_IN
    page=$work/page.md
    sed -e "s|https://example.org/erllama_cache_nif.git|file://$work/repository|" \
        -e "s|{erllama, \"0.12.0\"}|{erllama, {git, \"file://$1\", {branch, \"main\"}}}|" \
        -e "s|{:erllama, \"~> 0.12\"}|{:erllama, git: \"file://$1\", branch: \"main\"}|" \
        "$here/docs/guide/erllama.md" >"$page"
}

from_page() { # diff | sh, ARGUMENT...
    what=$1
    shift
    python3 "$here/proofs/dropin/page.py" "$what" "$page" "$@"
}

# A section's changes of files, in the current directory.
change() { # SECTION FILE...
    section=$1
    shift
    for file; do
        from_page diff "$section" "$file" .
    done
}

# A section's commands, or those of them that match.
do_commands() { # SECTION [PATTERN]
    from_page sh "$1" >"$work/all"
    grep -e "${2:-}" "$work/all" >"$work/commands" || fail "$1 has no command with: $2"
    run sh -eu "$work/commands"
}

# Gives a dependency that has been fetched what was compiled of the same sources.
give_compiled() { # DIRECTORY
    rm -rf "$1/native"
    cp -al "$work/compiled/native" "$1/native"
}

### What is seen then

# In a node that has the applications below a directory in its path, and starts one.
look() { # DIRECTORY APPLICATION QUESTION
    run erl -noinput -pa "$1"/*/ebin "$work/beams" -eval "
        {ok, _} = application:ensure_all_started($2),
        ok = erllama_cache_dropin:$3,
        ok = application:stop(erllama),
        halt(0)."
}

ask() { # TOOL FUNCTION [ATOM]
    case $1 in
        rebar3) bin/server eval "erllama_cache_dropin:$2(${3:-})." ;;
        mix) bin/server rpc "IO.puts(:erllama_cache_dropin.$2(${3:+:$3}))" ;;
    esac
}

says() { # WORD TOOL FUNCTION [ATOM]
    word=$1
    shift
    ask "$@" >"$work/log" 2>&1 && [ "$(cat "$work/log")" = "$word" ]
}

# In a release, which is started for it. The page asks in one way for each tool.
look_at_release() { # TOOL DIRECTORY KEYED_BY
    case $1 in
        rebar3) start=foreground asks=eval ;;
        mix) start=start asks=rpc ;;
    esac
    cd "$2"
    bin/server $start >"$work/node" 2>&1 </dev/null &
    node=$!
    until says true "$1" is_up; do
        kill -0 "$node" 2>/dev/null || fail "the release does not start: $(cat "$work/node")"
        [ $(($(date +%s) - begun)) -lt 600 ] || fail "no answer: $(cat "$work/log")"
    done
    says ok "$1" released "$3" || fail "this one is not in use in the release: $(cat "$work/log")"
    do_commands "Check that it is in use" "^bin/server $asks "
    grep -q "$2/lib/erllama_cache_nif-[0-9.]*/ebin/erllama_cache_writer.beam" "$work/log" ||
        fail "the page's question has another answer: $(cat "$work/log")"
    run bin/server stop
    wait "$node" || true
    node=
}

# By another implementation.
reads() {
    run python3 "$here/proofs/oracle/kvc_oracle.py" check --host "$DROPIN_ROOT"/*.kvc
}

is_undone() {
    [ -z "$(git status --porcelain)" ] || fail "more has changed than the page undoes: $(git diff)"
}

# What a reader is told who left a step out.
is_refused() { # COMMAND...
    if "$@" >"$work/log" 2>&1; then
        fail "with both modules it succeeds: $*"
    fi
    for place in "$work/log" "$page"; do
        grep -q 'Duplicated modules:' "$place" || fail "it fails otherwise: $(cat "$work/log")"
    done
}

### The ways

fork() { # STAND_IN KEYED_BY
    git clone -q "$1" "$work/fork.$2"
    cd "$work/fork.$2"
    libs=$PWD/_build/default/lib
    run rebar3 compile
    look "$libs" erllama "original()"

    rm src/erllama_cache_writer.erl
    change "In a fork" rebar.config src/erllama.app.src
    run rebar3 get-deps
    give_compiled "$libs/erllama_cache_nif"
    run rebar3 compile
    look "$libs" erllama "ours($2)"
    reads

    git checkout -q -- .
    rm rebar.lock
    is_undone
    # Where all that is compiled is in the path, what is left of the dependency is in use.
    run rebar3 compile
    look "$libs" erllama "comes_from(erllama_cache_nif)"
    do_commands "Out of a fork"
    run rebar3 compile
    look "$libs" erllama "original()"
    reads
}

by_rebar3() { # STAND_IN KEYED_BY
    server "$1" "$work/rebar3.$2"
    cd "$work/rebar3.$2"
    libs=$PWD/_build/default/lib
    release=$PWD/_build/default/rel/server
    run rebar3 release
    commit .
    look "$release/lib" server "original()"

    change "As a dependency, with rebar3" rebar.config src/server.app.src
    run rebar3 get-deps
    give_compiled "$libs/erllama_cache_nif"
    # First without the hook, then with it while all is compiled.
    cp rebar.config "$work/changed"
    sed -i '/^{overrides/,/^]}/d' rebar.config
    is_refused rebar3 release
    cp "$work/changed" rebar.config
    is_refused rebar3 release
    do_commands "As a dependency, with rebar3"
    run rebar3 release
    look_at_release rebar3 "$release" "$2"
    reads
    # And in a clone, where nothing has been compiled before.
    cd "$work/rebar3.$2"
    rm -rf _build
    run rebar3 get-deps
    give_compiled "$libs/erllama_cache_nif"
    run rebar3 release
    [ -e "$libs/erllama/hooked" ] || fail "the project's own hook has not run"
    look "$release/lib" server "ours($2)"

    git checkout -q -- rebar.config src
    do_commands "Out of a project with rebar3"
    is_undone
    run rebar3 release
    look "$release/lib" server "original()"
    reads
}

by_mix() { # STAND_IN KEYED_BY
    server "$1" "$work/mix.$2"
    cd "$work/mix.$2"
    release=$PWD/_build/prod/rel/server
    run mix deps.get
    run mix release
    commit .
    look "$release/lib" server "original()"

    change "As a dependency, with Mix" mix.exs
    # Without the page's second step.
    run mix deps.get
    give_compiled deps/erllama_cache_nif
    is_refused mix release --overwrite
    do_commands "As a dependency, with Mix"
    run mix release --overwrite
    look_at_release mix "$release" "$2"
    reads
    cd "$work/mix.$2"
    rm -rf _build deps
    run mix deps.get
    give_compiled deps/erllama_cache_nif
    run mix release
    look "$release/lib" server "ours($2)"

    git checkout -q -- mix.exs
    do_commands "Out of a project with Mix"
    is_undone
    run mix release
    look "$release/lib" server "original()"
    reads
}

copy_project "$work/repository"
commit "$work/repository"
git clone -q "$work/repository" "$work/compiled"
copy_cargo_cache "$work/compiled"
run make -C "$work/compiled/c_src"
beams "$work/beams" dropin
# It returns before it listens; there is time until the first release.
epmd -daemon

for keyed_by in tokens text; do
    stand_in "$keyed_by" "$work/erllama.$keyed_by"
    page_with "$work/erllama.$keyed_by"
    for way in fork by_rebar3 by_mix; do
        rm -rf "$DROPIN_ROOT"
        mkdir "$DROPIN_ROOT"
        "$way" "$work/erllama.$keyed_by" "$keyed_by"
        printf '%-7s %-10s in, in use, and out again\n' "$keyed_by" "$way"
    done
done
echo "dropin: passed in $(($(date +%s) - begun)) s"
