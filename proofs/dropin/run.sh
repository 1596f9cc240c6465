#!/bin/sh
# Proves that docs/guide/erllama.md puts this project into erllama and takes it out again, step by
# step, on a project that stands in for erllama: its name, its supervisor's child, and for its modules
# those of test/fakes. The dependency is a git one, as there, on a repository made of what is here now;
# the two lines that are added are taken from the page.
#
#   before   the project has an erllama_cache_writer of its own
#   in       it is deleted, the lines are added: a save goes through this one, whose file an
#            independent reader finds good
#   out      all of it is undone: the project's own is in use again, and the file still good
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
. "$here/proofs/lib.sh"
temp_dir
page=$here/docs/guide/erllama.md
toy=$work/erllama
root=$work/kv
begun=$(date +%s)

run() {
    quietly "$work/log" "$@"
}

commit() { # DIRECTORY
    git -C "$1" init -q
    git -C "$1" checkout -q -b main 2>/dev/null || true
    git -C "$1" add -A
    git -C "$1" -c user.name=dropin -c user.email=dropin@localhost commit -q -m 'As it is now'
}

# The project that stands in for erllama.
mkdir -p "$toy/src" "$root"
cp "$here"/test/fakes/*.erl "$toy/src/"
cat >"$toy/src/erllama.app.src" <<'END'
{application, erllama, [
    {description, "Stands in for erllama"},
    {vsn, "0.5.1"},
    {registered, []},
    {mod, {erllama_app, []}},
    {env, [{writer_max_concurrent, 3}]},
    {applications, [
        kernel,
        stdlib
    ]}
]}.
END
cat >"$toy/src/erllama_app.erl" <<'END'
-module(erllama_app).
-behaviour(application).
-behaviour(supervisor).
-export([start/2, stop/1, init/1]).

start(_Type, _Args) ->
    ok = erllama_fake:start(tier, os:getenv("TOY_ROOT")),
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
cat >"$toy/src/erllama_cache_writer.erl" <<'END'
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
printf '%s\n' '{erl_opts, [debug_info]}.' '{deps, []}.' >"$toy/rebar.config"
echo /_build/ >"$toy/.gitignore"
commit "$toy"

# This project, as a repository to clone from.
copy_project "$work/repository"
commit "$work/repository"

# Saves in the running application, and hands what it sees to a check.
save_in_toy() { # ERLANG
    (cd "$toy" && run env TOY_ROOT="$root" erl -noinput -pa _build/default/lib/*/ebin -eval "
        {ok, _} = application:ensure_all_started(erllama),
        Meta = #{save_reason => cold, quant_bits => 16, quant_type => f16,
                 fingerprint => <<1:256>>, fingerprint_mode => safe,
                 ctx_params_hash => <<2:256>>, tokens => [1, 15043, 3186], context_size => 4096},
        Save = fun() -> erllama_cache_writer:save(tier, disk, Meta, <<\"the model's state\">>) end,
        Home = fun(Module) -> filename:basename(filename:dirname(filename:dirname(code:which(Module)))) end,
        $1,
        ok = application:stop(erllama),
        halt(0).")
}

reads() { # by another implementation
    run python3 "$here/proofs/oracle/kvc_oracle.py" check --host "$root"/*.kvc
}

(cd "$toy" && run rebar3 compile)
save_in_toy '{error, its_own} = Save(), "erllama" = Home(erllama_cache_writer)'
echo "before  the project's own writer is in use"

# In: the lines that the page adds, with our address.
added() { # FILE
    awk -v file="$1" '
        /^ *\+\+\+ / { current = $2 }
        /^ *```$/ { current = "" }
        current == "b/" file && !/^ *\+\+\+/ && sub(/^   \+/, "")' "$page"
}
rm "$toy/src/erllama_cache_writer.erl"
added rebar.config | sed "s|https://example.org/erllama_cache_nif.git|file://$work/repository|" \
    >"$work/dependency"
added src/erllama.app.src >"$work/application"
for lines in dependency application; do
    [ -s "$work/$lines" ] || fail "the page adds no $lines"
done
sed -i -e "/^{deps, \[\]}\.\$/{r $work/dependency
d}" "$toy/rebar.config"
sed -i "/{applications, \[/r $work/application" "$toy/src/erllama.app.src"
(cd "$toy" && run rebar3 get-deps)
copy_cargo_cache "$toy/_build/default/lib/erllama_cache_nif"
(cd "$toy" && run rebar3 compile)
save_in_toy '
    "erllama_cache_nif" = Home(erllama_cache_writer),
    {ok, Key} = Save(),
    {error, already_present} = Save(),
    [Key] = erllama_cache_meta_srv:stored(),
    #{4 := 1, 16 := 1} = erllama_cache_counters:all(),
    #{limit := 3, saves := 1} = erllama_cache_writer:info(),
    [{erllama_cache_writer, Writer, worker, _}] = supervisor:which_children(erllama_sup),
    Writer = whereis(erllama_cache_writer),
    [] = supervisor:which_children(erllama_cache_nif_sup),
    {ok, Theirs} = application:get_key(erllama, modules),
    {ok, Ours} = application:get_key(erllama_cache_nif, modules),
    [] = [Module || Module <- Ours, lists:member(Module, Theirs)]'
reads
echo "in      this one is in use, with the project's keys, reservations and counters"

# Out.
git -C "$toy" checkout -q -- .
rm "$toy/rebar.lock"
[ -z "$(git -C "$toy" status --porcelain)" ] || fail "more has changed than the page undoes"
# Where all that is compiled is in the path, what is left of the dependency is in use until it is removed.
(cd "$toy" && run rebar3 compile)
save_in_toy '"erllama_cache_nif" = Home(erllama_cache_writer)'
removal=$(grep '^rm -rf _build/' "$page") || fail "the page does not remove what was compiled"
(cd "$toy" && run sh -c "$removal")
(cd "$toy" && run rebar3 compile)
save_in_toy '{error, its_own} = Save(), "erllama" = Home(erllama_cache_writer)'
reads
echo "out     the project's own is in use again, the files are good"
echo "dropin: passed in $(($(date +%s) - begun)) s"
