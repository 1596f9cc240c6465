#!/bin/sh
# Proves that the commands of README.md and of the pages below docs/ work as they are printed, in a clean
# copy of the project. Each command in an indented block of the README or of a guide, and each command
# in the text of any page, is looked up in `do_it` below, which runs it or names the step that does. A
# command that is not known there is an error, and so is a target that the Makefile does not have.
#
# The sessions in Erlang and Elixir that go with them are taken from the fences of the README and of the
# guides, and have to end without an exception. Prints a table at the end. The text and the examples of
# the guide to kvc have a test of their own.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/proofs/lib.sh"
temp_dir
copy=$work/erllama_cache_nif
guides=$here/docs/guide
begun=$(date +%s)

# The copy is not built, whatever is said of this one.
unset BUILT
copy_project "$copy"
copy_cargo_cache "$copy"

# The N-th fence of a language in a page that is not indented, with a directory of ours for the one that
# is named there.
fence() { # PAGE LANGUAGE N
    awk -v fence='```'"$2" -v want="$3" '
        $0 == "```" { inside = 0 }
        inside && n == want
        $0 == fence { inside = 1; n++ }' "$1" | sed "s|/tmp/kv|$work/kv|g"
}

# A paragraph at a time: code may go on in the next line.
in_backticks() { # PAGE
    awk 'BEGIN { RS = ""; FS = "`" }
        { for (n = 2; n <= NF; n += 2) { gsub(/[ \n]+/, " ", $n); print $n } }' "$1"
}

# What stands outside of the fences of some pages.
text() { # PAGE...
    for page; do
        awk '/^ *```/ { fenced = !fenced } !fenced' "$page"
    done
}

pages() { # FIND'S CONDITIONS...
    find "$here/docs" -name '*.md' "$@" | sort
}

# One command a line, without comments: lines that are indented by four and at a shell's prompt where
# there is one; and what stands between backticks and begins with the name of a program. Of design and
# proofs the pages name programs that nobody is asked to run, so fewer names count there.
commands() {
    # shellcheck disable=SC2046  # names of ours, without spaces
    text "$here/README.md" $(pages -path '*/guide/*') >"$work/blocks"
    # shellcheck disable=SC2046
    text "$here/README.md" "$guides/erlang.md" "$guides/elixir.md" \
        $(pages -path '*/reference/*') >"$work/use"
    # shellcheck disable=SC2046
    text $(pages ! -path '*/reference/*' ! -path '*/guide/erlang.md' ! -path '*/guide/elixir.md' \
        ! -path '*/guide/kvc.md') >"$work/other"
    sed -n -e 's/^ \{4,\}\$ //p' -e 's/^    \([a-z]\)/\1/p' "$work/blocks" | sed 's/  *#.*//'
    in_backticks "$work/use" |
        grep -E '^(make$|(make|mkdir|erl|mix|head|cargo|rebar3|kvc|git|sh|python3) )' || true
    in_backticks "$work/other" | grep -E '^(make|install|cargo|rebar3|kvc|git) ' || true
}

# A session in a real shell. It prints what is raised and goes on, so that is what is looked for.
erlang() { # SESSION COMMAND...
    session=$1
    shift
    printf '%s\nthe_end.\nhalt().\n' "$session" | "$@" >"$work/session" 2>&1 || true
    cat "$work/session"
    grep -q '^\(.*> \)\?the_end$' "$work/session" &&
        ! grep -qE '^(.*> )?\* |\*\* ' "$work/session"
}

# The first node stays until the second has ended. Both are started as the page says.
two_nodes() { # COMMAND
    page=$guides/several-machines.md
    mkfifo "$work/until"
    {
        fence "$page" erl 1
        echo 'saved.'
        cat "$work/until"
        echo 'halt().'
    } | $(echo "$1" | sed 's/ two / one /') >"$work/one" 2>&1 &
    one=$!
    exec 3>"$work/until"
    tries=0
    until grep -q '^\(.*> \)\?saved$' "$work/one"; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || { cat "$work/one"; return 1; }
        sleep 0.2
    done
    # Who types is slower than the group, which hears of a new node a little later.
    met='Met = fun Met(0) -> never; Met(N) ->
        Groups = pg:which_groups(erllama_cache_peers),
        case lists:append([pg:get_members(erllama_cache_peers, Group) || Group <- Groups]) of
            [_, _] -> met;
            _ -> timer:sleep(20), Met(N - 1)
        end end. met = Met(1000).'
    # shellcheck disable=SC2086  # a command in words
    erlang "$(fence "$page" erl 2; echo "$met"; fence "$page" erl 3)" $1
    exec 3>&-
    wait "$one"
    ! grep -qE '\*\* ' "$work/one"
}

in_mix_project() { # COMMAND...
    mkdir -p "$work/mix/config"
    fence "$guides/elixir.md" elixir 1 | sed "s|\"../erllama_cache_nif\"|\"$copy\"|" >"$work/deps"
    fence "$guides/elixir.md" elixir 2 >"$work/mix/config/config.exs"
    fence "$guides/elixir.md" elixir 3 >"$work/mix/save.exs"
    {
        echo 'defmodule Readme.MixProject do'
        echo '  use Mix.Project'
        echo '  def project, do: [app: :readme, version: "0.1.0", deps: deps()]'
        cat "$work/deps"
        echo 'end'
    } >"$work/mix/mix.exs"
    (cd "$work/mix" && MIX_REBAR3="$(command -v rebar3)" ELIXIR_ERL_OPTIONS="+fnu" "$@")
}

elsewhere() { # WHO
    echo "$1" >"$work/who"
}

target() { # COMMAND WHO
    target=${1#make }
    grep -q "^${target%% *}:" "$here/Makefile" || fail "there is no target for: $1"
    elsewhere "$2"
}

# Runs a command, or says who does.
do_it() { # COMMAND
    cd "$copy"
    case $1 in
        make | "make demo" | "make edoc" | "make chunks") $1 ;;
        "make setup") $1 ;;
        "make distclean")
            cp -a "$copy" "$work/again"
            make -C "$work/again" distclean
            [ ! -e "$work/again/native/target" ] && [ ! -e "$work/again/_build" ]
            ;;
        # What it fetches is not asked for twice, nor missed where there is no network.
        "make demo-llm")
            [ ! -d "$here/_build/llm" ] || cp -a "$here/_build/llm" _build/
            MAY_SKIP=yes TOKENS=256 LLM_THREADS=1 make demo-llm >"$work/llm"
            cat "$work/llm"
            ! grep SKIPPED "$work/llm" || elsewhere "by nobody: it could not be fetched"
            ;;
        "make demo FILE=path") make demo FILE="$copy/README.md" ;;
        "make bench-"*) target "$1" "a step of its own, its figures by hand, on a machine at rest" ;;
        "make kvc") make kvc ;;
        "make install PREFIX=\$HOME/.local")
            make install PREFIX="$work/local"
            "$work/local/bin/kvc" --version
            (cd "$work/local" && ls share/man/man1/kvc-ls.1 share/bash-completion/completions/kvc)
            ;;
        "make uninstall PREFIX=\$HOME/.local")
            make uninstall PREFIX="$work/local"
            [ -z "$(find "$work/local" -type f)" ]
            ;;
        kvc*" /var/cache/kv")
            built=$copy/native/target/release/kvc
            [ -x "$built" ] || make kvc
            mkdir -p "$work/kv"
            sh -c "$(echo "$1" | sed "s|^kvc|$built|; s|/var/cache/kv|$work/kv|")"
            ;;
        kvc\ *) elsewhere "the tests of kvc" ;;
        "make "[a-z]*) target "$1" "a step of its own" ;;
        "rebar3 compile") elsewhere "make dropin" ;;
        "rebar3 hex "* | "git tag "*) elsewhere "whoever makes a release" ;;
        "rebar3 eunit --module="*)
            [ -e "$here/test/${1#*=}.erl" ] || fail "there is no module for: $1"
            elsewhere "make test"
            ;;
        "install -d -m 700 -o node /var/cache/kv") install -d -m 700 -o "$(id -un)" "$work/cache" ;;
        "mkdir -p /tmp/kv") mkdir -p "$work/kv" ;;
        "erl -pa _build/default/lib/erllama_cache_nif/ebin -config sys")
            fence "$guides/erlang.md" erlang 1 >sys.config
            # shellcheck disable=SC2086  # a command in words
            erlang "$(fence "$guides/erlang.md" erlang 2)" $1
            ;;
        "erl -pa _build/default/lib/erllama_cache_nif/ebin")
            # shellcheck disable=SC2086
            erlang "$(fence "$here/README.md" erlang 1)" $1
            make chunks
            # shellcheck disable=SC2086
            erlang "$(sed -n 's/^ *1> //p' "$work/blocks")" $1
            grep -q 'Payload :: binary()' "$work/session" || fail "the shell shows no documentation"
            ;;
        "mkdir -p /tmp/kv/one /tmp/kv/two") mkdir -p "$work/kv/one" "$work/kv/two" ;;
        "erl -sname one "*) elsewhere "with the other node" ;;
        "erl -sname two "*) two_nodes "$1" ;;
        "mix run save.exs") in_mix_project mix run save.exs ;;
        "erl +SDio N") erl +SDio 4 -noinput -eval 'halt().' ;;
        "head -c 32 /dev/urandom > secret && chmod 600 secret")
            sh -eu -c "$1"
            erl -noinput -pa _build/default/lib/erllama_cache_nif/ebin -eval '
                {ok, _} = erllama_cache_store:start_link(s, #{root => ".", mac_key => {file, "secret"}}),
                halt(0).'
            ;;
        *) fail "nobody has said how this is checked: $1" ;;
    esac
}

commands | awk '!seen[$0]++' >"$work/commands"
# A reader compiles first.
(echo make; grep -vx make "$work/commands") >"$work/ordered"
while IFS= read -r command; do
    echo passed >"$work/who"
    # Not as a condition: `set -e` would not hold in there.
    set +e
    (set -e; do_it "$command") >"$work/log" 2>&1 </dev/null
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        cat "$work/log" >&2
        fail "failed: $command"
    fi
    printf '%-66s  %s\n' "$command" "$(cat "$work/who")" >>"$work/table"
done <"$work/ordered"

cat "$work/table"
echo "readme: its commands work, tried in $(($(date +%s) - begun)) s"
