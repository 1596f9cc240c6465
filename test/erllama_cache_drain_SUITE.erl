%% Whole nodes that end by init:stop() while saves are pending: alone, with stores of their own, and
%% with erllama, which stops before this application. In each, 256 MiB of payload are pending, or
%% DRAIN_BYTES.
-module(erllama_cache_drain_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/0, init_per_testcase/2, end_per_testcase/2]).
-export([alone_the_writer_waits/1, alone_the_application_waits/1, alone_the_rest_is_named/1]).
-export([tokens_the_writer_waits/1, tokens_the_application_waits/1, tokens_the_rest_is_named/1]).
-export([text_the_writer_waits/1, text_the_application_waits/1, text_the_rest_is_named/1]).
%% What the nodes run.
-export([play/1]).
%% The application that stands in for erllama, and its supervisors.

-import(erllama_cache_test_util, [files/1, file_of/2, run_command/2, run_node/3, eventually/2]).
-import(erllama_cache_erllama_util, [load_fakes/1, meta/1]).
-import(erllama_cache_hooked_host, [hold_turns/0, next_turn/1]).

-define(WRITER, erllama_cache_writer).
-define(OURS, erllama_cache_nif).
-define(HOSTS, erllama).
-define(TIER, drain_tier).
%% So many saves are pending; one more, the first, has ended before.
-define(SAVES, 16).
-define(BYTES, "268435456").
%% Milliseconds: longer than any disk takes.
-define(LONG, 120000).

suite() ->
    [{timetrap, {minutes, 5}}].

all() ->
    [{group, nodes}].

%% Most of them only wait, for the time that a writer has.
groups() ->
    [{nodes, [parallel], [
        alone_the_writer_waits, alone_the_application_waits, alone_the_rest_is_named,
        tokens_the_writer_waits, tokens_the_application_waits, tokens_the_rest_is_named,
        text_the_writer_waits, text_the_application_waits, text_the_rest_is_named
    ]}].

init_per_testcase(Case, Config) ->
    Name = lists:concat([Case, ".", os:getpid(), ".", erlang:unique_integer([positive])]),
    Root = filename:join(parent(?config(priv_dir, Config)), Name),
    ok = file:make_dir(Root),
    [{root, Root} | Config].

end_per_testcase(_Case, Config) ->
    file:del_dir_r(?config(root, Config)).

%% In memory, where that has room for all of them: how fast a disk is is not what is tested.
parent(Otherwise) ->
    Needed = 8 * bytes(),
    case run_command("df", ["--output=avail", "--block-size=1", "/dev/shm"]) of
        {0, Said} ->
            [_Head, Available | _] = string:lexemes(Said, " \n"),
            case list_to_integer(Available) > Needed of
                true -> "/dev/shm";
                false -> Otherwise
            end;
        _ ->
            Otherwise
    end.

bytes() ->
    list_to_integer(os:getenv("DRAIN_BYTES", ?BYTES)).

%%% Cases

%% The saves run on when the writer waits for them. On a slow machine the application does the rest.
alone_the_writer_waits(Config) -> the_writer_waits(alone, Config).
tokens_the_writer_waits(Config) -> the_writer_waits(tokens, Config).
text_the_writer_waits(Config) -> the_writer_waits(text, Config).

the_writer_waits(Kind, Config) ->
    ?assertEqual({0, ""}, stop_node(Kind, writer, ?LONG, Config)),
    assert_stored(lists:seq(0, ?SAVES), Kind, Config).

%% None of them runs on before the writer is gone, and erllama with it.
alone_the_application_waits(Config) -> the_application_waits(alone, Config).
tokens_the_application_waits(Config) -> the_application_waits(tokens, Config).
text_the_application_waits(Config) -> the_application_waits(text, Config).

the_application_waits(Kind, Config) ->
    ?assertEqual({0, ""}, stop_node(Kind, application, ?LONG, Config)),
    assert_stored(lists:seq(0, ?SAVES), Kind, Config).

%% None of them ever runs on.
alone_the_rest_is_named(Config) -> the_rest_is_named(alone, Config).
tokens_the_rest_is_named(Config) -> the_rest_is_named(tokens, Config).
text_the_rest_is_named(Config) -> the_rest_is_named(text, Config).

the_rest_is_named(Kind, Config) ->
    {0, Said} = stop_node(Kind, nobody, 0, Config),
    %% The last is detached, and not behind its caller.
    Bytes = bytes() div ?SAVES * (?SAVES - 1),
    Facts = [["saves_left: "], ["saves ", integer_to_list(?SAVES), $\n],
             ["pending bytes ", integer_to_list(Bytes), ", "]],
    [?assertNotEqual({nomatch, Said}, {string:find(Said, lists:flatten(Fact)), Said})
     || Fact <- Facts],
    ?assertEqual(1, length(string:split(Said, "REPORT====", all)) - 1),
    assert_stored([0], Kind, Config).

%% Each of these is there with its payload, and nothing else is.
assert_stored(Numbers, Kind, Config) ->
    Root = ?config(root, Config),
    Keys = [{N, key(N, keyed_by(Kind))} || N <- Numbers],
    ?assertEqual(lists:sort([filename:basename(file_of(Root, Key)) || {_, Key} <- Keys]),
                 files(Root)),
    Store = binary_to_atom(iolist_to_binary(filename:basename(Root))),
    {ok, Pid} = erllama_cache_store:start_link(Store, #{root => Root, keyed_by => keyed_by(Kind)}),
    Noise = noise(bytes()),
    [
        begin
            {ok, _, Payload} = erllama_cache_store:load(Store, Key),
            ?assert(Payload =:= payload(N, Noise))
        end
     || {N, Key} <- Keys
    ],
    ok = gen_server:stop(Pid).

%%% The node

stop_node(Kind, First, DrainMs, Config) ->
    %% Where nothing but the application and this module is known.
    Fakes = filename:dirname(code:where_is_file("erllama_fake.beam")),
    run_node("", {?MODULE, play}, [
        Fakes, atom_to_list(Kind), atom_to_list(First), integer_to_list(DrainMs),
        ?config(root, Config), integer_to_list(bytes())
    ]).

play([Fakes, Kind, First, DrainMs, Root, Bytes]) ->
    true = code:add_pathz(Fakes),
    ok = start_node(list_to_atom(Kind), list_to_integer(DrainMs), Root),
    Noise = noise(list_to_integer(Bytes)),
    ok = save_behind(0, Noise),
    ok = ?WRITER:flush(infinity),
    ok = go_on_while_awaited(list_to_atom(First)),
    [ok = save_behind(N, Noise) || N <- lists:seq(1, ?SAVES - 1)],
    ok = save_detached(?SAVES, Noise),
    {error, {pending, ?SAVES}} = ?WRITER:flush(0),
    init:stop().

save_behind(N, Noise) ->
    {ok, _} = ?WRITER:save(?TIER, disk, meta([N]), payload(N, Noise), 0),
    ok.

save_detached(N, Noise) ->
    {ok, _} = ?WRITER:save_async(?TIER, disk, meta([N]), payload(N, Noise), #{detach => true}),
    %% It waits for a slot, before all those that nobody waits for.
    eventually(fun() -> [Row || #{behind := false} = Row <- ?WRITER:waiters()] =/= [] end, ?LONG).

%% Nothing is written before this one waits for it, and from then on nothing while nobody does. Who
%% returns too early therefore loses the rest.
go_on_while_awaited(First) ->
    Self = self(),
    %% The caller ends normally, and so leaves it alone.
    Holder = spawn_link(fun() ->
        Turns = hold_turns(),
        Waiting = [{writer, whereis(?WRITER)}, {application, drain()}],
        Self ! {self(), held},
        ok = eventually(fun() -> waits(proplists:get_value(First, Waiting)) end, ?LONG),
        go_on_while_awaited(Turns, [Pid || {_, Pid} <- Waiting])
    end),
    receive {Holder, held} -> ok end.

go_on_while_awaited(Turns, Waiting) ->
    ok = eventually(fun() -> lists:any(fun waits/1, Waiting) end, ?LONG),
    go_on_while_awaited(next_turn(Turns), Waiting).

drain() ->
    [Drain] = [Pid || {erllama_cache_drain, Pid, _, _}
                      <- supervisor:which_children(erllama_cache_nif_sup)],
    Drain.

waits(Pid) when is_pid(Pid) ->
    case process_info(Pid, current_stacktrace) of
        {current_stacktrace, Stack} ->
            [] =/= [here || {erllama_cache_pending, flush, _, _} <- Stack];
        undefined ->
            false
    end;
waits(undefined) ->
    false.

start_node(Kind, DrainMs, Root) ->
    ok = application:load(?OURS),
    Stores = [{?TIER, #{root => Root}} || Kind =:= alone],
    [ok = application:set_env(?OURS, Key, Value)
     || {Key, Value} <- [{stores, Stores}, {write_behind, #{}}, {drain_ms, DrainMs},
                         {max_concurrent, 2}]],
    {ok, _} = application:ensure_all_started(crypto),
    ok = application:start(?OURS),
    start_erllama(Kind, Root).

start_erllama(alone, _Root) ->
    ok;
start_erllama(KeyedBy, Root) ->
    ok = load_fakes(KeyedBy),
    ok = erllama_fake:start(?TIER),
    ok = erllama_fake_app:load(?HOSTS, ?TIER, Root, [?OURS]),
    application:start(?HOSTS).

%%% What is saved

keyed_by(alone) -> tokens;
keyed_by(KeyedBy) -> KeyedBy.

key(N, KeyedBy) ->
    {ok, Key} = erllama_cache_store:key(meta([N]), #{keyed_by => KeyedBy}),
    Key.

%% Of which each payload is a part, so that they need no more memory than one.
noise(Bytes) ->
    Size = Bytes div ?SAVES + 1024 * ?SAVES,
    crypto:crypto_one_time(aes_128_ctr, <<0:128>>, <<0:128>>, <<0:Size/unit:8>>, true).

payload(N, Noise) ->
    binary:part(Noise, 1024 * N, byte_size(Noise) - 1024 * ?SAVES).
