%% What the tests of the built-in store share: the fixtures, stores for the length of a function,
%% saves in short, and processes that hold a reservation.
-module(erllama_cache_store_util).

-include("erllama_cache_store_util.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([store_tests/1, running_tests/2, application_tests/1, set_env/1]).
-export([with_store/2, with_store/3, with_two_stores/2, its_books_balance/2]).
-export([running/3, start_store/2, start_writer/1]).
-export([meta/1, key/1, save/2, save/3, reserve/2, is_known/2, watches/1]).
-export([die_published/2, none_reserved/1, bytes_in/1, corrupt_payload/1, patch_file/3]).
-export([in_process/1, in_processes/2, start_owner/1]).

-import(erllama_cache_test_util, [
    each/3, temporary_dir/1, eventually/1, files/1, flip/2, patch/3, actor/0, ask/2, stop/1
]).

%%% Fixtures

%% EUnit tests of a store, each in a root of its own and with a writer; they start the store
%% themselves. What is meant to crash there, and to be found corrupt, is nothing to read about.
store_tests(Tests) ->
    silent(each(fun setup/0, fun teardown/1, Tests)).

%% EUnit tests that find a store running, in a root of its own, and a writer with this
%% configuration.
running_tests(Config, Tests) ->
    Setup = fun() ->
        Root = temporary_dir(?MODULE),
        {ok, _} = start_store(Root, #{}),
        {ok, _} = start_writer(Config),
        Root
    end,
    Teardown = fun(Root) ->
        [ok = stop(Name) || Name <- [erllama_cache_writer, ?STORE]],
        ok = file:del_dir_r(Root)
    end,
    each(Setup, Teardown, Tests).

%% EUnit tests of the application, each with a directory of its own; they start it themselves.
application_tests(Tests) ->
    silent(each(fun load_application/0, fun unload_application/1, Tests)).

silent(Tests) ->
    {setup, fun erllama_cache_test_util:silence/0, fun erllama_cache_test_util:unsilence/1,
        [Tests]}.

setup() ->
    Root = temporary_dir(?MODULE),
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    Root.

teardown(Root) ->
    ok = gen_server:stop(erllama_cache_writer),
    ok = file:del_dir_r(Root).

load_application() ->
    ok = application:load(erllama_cache_nif),
    temporary_dir(?MODULE).

unload_application(Root) ->
    _ = application:stop(erllama_cache_nif),
    ok = application:unload(erllama_cache_nif),
    ok = file:del_dir_r(Root).

%% It goes with the application when that is unloaded.
set_env(Env) ->
    _ = [ok = application:set_env(erllama_cache_nif, Key, Value)
         || {Key, Value} <- maps:to_list(Env)],
    ok.

%%% Stores

with_store(Options, Fun) ->
    with_store(?STORE, Options, Fun).

with_store(Name, Options, Fun) ->
    {ok, Pid} = erllama_cache_store:start_link(Name, Options),
    try
        Result = Fun(Name),
        ok = its_books_balance(Name, Options),
        Result
    after
        ok = gen_server:stop(Pid)
    end.

%% Whatever was done to a store: what it counts is what is there, and it watches over nobody when
%% nothing is reserved.
its_books_balance(Name, Options) ->
    #{used := Used, should := Should, lengths := Lengths, should_lengths := ShouldLengths} =
        gen_server:call(Name, audit),
    ?assertEqual(ShouldLengths, Lengths),
    is_integer(maps:get(max_bytes, Options, infinity)) andalso ?assertEqual(Should, Used),
    case erllama_cache_store:info(Name) of
        #{reservations := 0} -> eventually(fun() -> watches(Name) =:= 0 end);
        #{} -> ok
    end.

%% Two stores on one root, as two nodes have them.
with_two_stores(Root, Fun) ->
    with_store(#{root => Root}, fun(Store) ->
        with_store(other_store, #{root => Root}, fun(Other) -> Fun(Store, Other) end)
    end).

%% A store and a writer with this configuration while `Fun' runs.
running(Root, Config, Fun) ->
    {ok, Store} = start_store(Root, maps:with([tier, mac_key, max_bytes], Config)),
    {ok, Writer} = start_writer(maps:without([tier, max_bytes], Config)),
    try
        Fun()
    after
        [ok = gen_server:stop(Pid) || Pid <- [Writer, Store]]
    end.

start_store(Root, Options) ->
    trapping(fun() -> erllama_cache_store:start_link(?STORE, Options#{root => Root}) end).

start_writer(Config) ->
    trapping(fun() ->
        erllama_cache_writer:start_link(Config#{host => erllama_cache_store})
    end).

%% A server that does not start takes who is linked to it along.
trapping(Start) ->
    Trapped = process_flag(trap_exit, true),
    try Start() of
        {error, Reason} = Error ->
            %% From OTP 26 on, it has been received by who started it.
            Consumed = list_to_integer(erlang:system_info(otp_release)) >= 26,
            Consumed orelse receive {'EXIT', _, Reason} -> true end,
            Error;
        Started ->
            Started
    after
        process_flag(trap_exit, Trapped)
    end.

%%% Saves in short

meta(N) ->
    erllama_cache_test_util:meta([N]).

key(N) ->
    {ok, Key} = erllama_cache_store:key(meta(N)),
    Key.

save(Store, N) ->
    save(Store, N, ?PAYLOAD).

save(Store, N, Payload) ->
    {ok, Key} = erllama_cache_writer:save(Store, disk, meta(N), Payload),
    Key.

reserve(Store, Key) ->
    erllama_cache_store:reserve(Store, disk, Key, 1000).

is_known(Store, Key) ->
    erllama_cache_index:row(Store, Key) =/= none.

watches(Store) ->
    #{watches := Watches} = gen_server:call(Store, audit),
    Watches.

%% A process that dies between publishing a file and telling of it.
die_published(Store, Key) ->
    in_process(fun() ->
        {ok, Token} = reserve(Store, Key),
        erllama_cache_store:mark_published(Store, Key, Token, "path")
    end).

%% Waits until the server has heard of every death and has done with it.
none_reserved(Store) ->
    eventually(fun() -> maps:get(reservations, erllama_cache_store:info(Store)) =:= 0 end),
    _ = sys:get_state(Store),
    ok.

%% Files may go while they are counted.
bytes_in(Root) ->
    lists:sum([filelib:file_size(filename:join(Root, Name)) || Name <- files(Root)]).

corrupt_payload(Path) ->
    {ok, File} = file:read_file(Path),
    ok = file:write_file(Path, flip(File, byte_size(File) - 1)).

patch_file(Path, Offset, Bytes) ->
    {ok, File} = file:read_file(Path),
    ok = file:write_file(Path, patch(File, Offset, Bytes)).

%%% Processes

%% What a function returns in a process of its own, which is dead by then.
in_process(Fun) ->
    [Result] = in_processes(1, fun(_) -> Fun() end),
    Result.

%% They all begin before the first one is waited for.
in_processes(Count, Fun) ->
    Started = [spawn_monitor(fun() -> exit({result, Fun(N)}) end) || N <- lists:seq(1, Count)],
    [
        receive
            {'DOWN', Monitor, process, Pid, {result, Result}} -> Result;
            {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
        end
     || {Pid, Monitor} <- Started
    ].

%% A process that lives on and does what it is asked, with its first answer.
start_owner(Fun) ->
    Owner = actor(),
    {Owner, ask(Owner, Fun)}.
