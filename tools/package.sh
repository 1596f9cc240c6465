#!/bin/sh
# Proves that the package of a release has all that it takes to use it: packs what `files' of the
# application's description names, unpacks it in an empty directory, and compiles, saves and loads there.
# With a word it writes the archive there and stays.
#
#     tools/package.sh [ARCHIVE.tar.gz]
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"
temp_dir

# As a Hex package is made: names may have wildcards, and a directory is meant with all below it.
erl -noinput -eval '
    {ok, [{application, _, Keys}]} = file:consult("src/erllama_cache_nif.app.src"),
    Files = proplists:get_value(files, Keys),
    Below = fun Below(Path) ->
        case filelib:is_dir(Path) of
            true -> lists:append([Below(Each) || Each <- filelib:wildcard(Path ++ "/*")]);
            false -> [Path]
        end
    end,
    lists:foreach(fun(Pattern) ->
        case filelib:wildcard(Pattern) of
            [] -> io:format(standard_error, "package: there is no ~ts~n", [Pattern]), halt(1);
            Found -> [io:format("~ts~n", [Path]) || Each <- Found, Path <- Below(Each)]
        end
    end, Files),
    halt().' >"$work/list" || fail "the list of files is wrong"
(cd "$here" && tar -czf "$work/package.tar.gz" -T "$work/list")
mkdir "$work/empty"
tar -xzf "$work/package.tar.gz" -C "$work/empty"
echo "package: $(wc -l <"$work/list") files, $(wc -c <"$work/package.tar.gz") bytes"
[ "$(wc -c <"$work/package.tar.gz")" -lt 8388608 ] || fail "Hex takes no more than 8 MB"

copy_cargo_cache "$work/empty"
(cd "$work/empty" && quietly "$work/log" rebar3 compile)
mkdir "$work/kv"
(
    cd "$work/empty"
    erl -noinput -pa _build/default/lib/erllama_cache_nif/ebin -eval '
        {ok, _} = erllama_cache_store:start_link(s, #{root => "'"$work/kv"'"}),
        {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
        {ok, Key} = erllama_cache_store:save(s, #{
            save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<1:256>>,
            fingerprint_mode => safe, ctx_params_hash => <<2:256>>, tokens => [1],
            context_size => 4096}, <<"state">>),
        {ok, _, <<"state">>} = erllama_cache_store:load(s, Key),
        halt(0).'
)
[ $# -eq 0 ] || cp "$work/package.tar.gz" "$1"
echo "package: what app.src names compiles in an empty directory, saves and loads"
