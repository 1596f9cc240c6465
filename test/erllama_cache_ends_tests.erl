%% What ends in the middle of a save or a wait: the application, the code that runs, a caller that
%% has no memory to spare. Each in a node of its own, which has nothing else to lose.
-module(erllama_cache_ends_tests).

-include_lib("eunit/include/eunit.hrl").

-export([play/1]).

-import(erllama_cache_test_util, [
    meta/0, meta/1, actor/0, ask/2, eventually/1, own_messages/0, run_node/3
]).

-define(WRITER, erllama_cache_writer).
-define(STORE, ends_store).
-define(HOOKED, erllama_cache_hooked_host).
-define(LARGE, (32 bsl 20)).

ends_test_() ->
    [{atom_to_list(Name), {timeout, 60, fun() -> in_its_own_node(Name) end}}
     || {Name, _} <- tests()].

in_its_own_node(Name) ->
    Root = filename:join("/tmp", lists:concat(["erllama_cache_ends.", os:getpid(), ".", Name])),
    ok = file:make_dir(Root),
    try
        ?assertEqual({0, ""}, run_node("", {?MODULE, play}, [atom_to_list(Name), Root]))
    after
        ok = file:del_dir_r(Root)
    end.

tests() ->
    [
        {the_application_stops_under_a_save, fun the_application_stops_under_a_save/1},
        {the_application_stops_under_a_background_save,
            fun the_application_stops_under_a_background_save/1},
        {the_application_stops_under_a_detached_save,
            fun the_application_stops_under_a_detached_save/1},
        {the_writers_code_is_purged_under_a_waiter,
            fun the_writers_code_is_purged_under_a_waiter/1},
        {the_library_is_loaded_twice, fun the_library_is_loaded_twice/1},
        {a_caller_with_little_memory, fun a_caller_with_little_memory/1}
    ].

play([Name, Root]) ->
    ok = logger:set_primary_config(level, none),
    ok = application:load(erllama_cache_nif),
    ok = application:set_env(erllama_cache_nif, stores, [{?STORE, #{root => Root}}]),
    {ok, _} = application:ensure_all_started(erllama_cache_nif),
    Test = proplists:get_value(list_to_existing_atom(Name), tests()),
    Status =
        try
            Test(Root),
            0
        catch
            Class:Reason:Stack -> io:format("~p~n", [{Class, Reason, Stack}]), 1
        end,
    halt(Status).

%%% The application

%% The store is gone when the save comes to publish, or has been published for it to find at its
%% next start: a file is there whole or not at all.
the_application_stops_under_a_save(Root) ->
    Payload = rand:bytes(?LARGE),
    {Saver, Monitor} = spawn_monitor(fun() ->
        receive begin_it -> ?WRITER:save(?STORE, disk, meta(), Payload) end
    end),
    Turns = ?HOOKED:stop_after_first_slice(fun() -> Saver ! begin_it, Saver end),
    ok = application:stop(erllama_cache_nif),
    ok = ?HOOKED:go_on(Turns),
    receive {'DOWN', Monitor, process, Saver, Reason} -> {noproc, _} = Reason end,
    whole_or_not_at_all(Root, Payload).

the_application_stops_under_a_background_save(Root) ->
    Payload = rand:bytes(?LARGE),
    {Turns, Ref} = stopped_in_the_background(Payload, #{}),
    ok = application:stop(erllama_cache_nif),
    ok = ?HOOKED:go_on(Turns),
    receive {?WRITER, Ref, Result} -> {error, _} = Result end,
    [] = own_messages(),
    whole_or_not_at_all(Root, Payload).

%% It waits for the save, whose store stops later.
the_application_stops_under_a_detached_save(Root) ->
    Payload = rand:bytes(?LARGE),
    {Turns, Ref} = stopped_in_the_background(Payload, #{detach => true}),
    {Stopper, Monitor} = spawn_monitor(fun() -> ok = application:stop(erllama_cache_nif) end),
    eventually(fun() -> whereis(?WRITER) =:= undefined end),
    true = is_process_alive(Stopper),
    ok = ?HOOKED:go_on(Turns),
    receive {'DOWN', Monitor, process, Stopper, normal} -> ok end,
    receive {?WRITER, Ref, Result} -> {ok, _} = Result end,
    {ok, [_]} = file:list_dir(Root),
    whole_or_not_at_all(Root, Payload).

%% A save that has written a slice.
stopped_in_the_background(Payload, Opts) ->
    Self = self(),
    Turns = ?HOOKED:stop_after_first_slice(fun() ->
        {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(), Payload, Opts),
        Self ! {saving, Ref},
        eventually(fun() -> ?WRITER:current() =:= 1 end),
        [#{pid := Saver}] = ?WRITER:holders(),
        Saver
    end),
    {Turns, receive {saving, Ref} -> Ref end}.

whole_or_not_at_all(Root, Payload) ->
    eventually(fun() -> map_get(tmp, erllama_cache_nif:live_objects()) =:= 0 end),
    {ok, _} = application:ensure_all_started(erllama_cache_nif),
    {ok, Key} = erllama_cache_store:key(meta()),
    case erllama_cache_store:load(?STORE, Key) of
        {ok, _, Payload} -> ok;
        miss -> {ok, []} = file:list_dir(Root)
    end,
    {ok, Next} = ?WRITER:save(?STORE, disk, meta([1]), <<"the next one">>),
    {ok, _, <<"the next one">>} = erllama_cache_store:load(?STORE, Next).

%%% Code

%% A waiter in the code that is purged dies of that, as any process would, and leaves the queue;
%% whoever holds a slot keeps it.
the_writers_code_is_purged_under_a_waiter(_Root) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    {Waiter, Monitor} = spawn_monitor(fun() -> ?WRITER:acquire(infinity) end),
    eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
    reload(?WRITER),
    receive {'DOWN', Monitor, process, Waiter, killed} -> ok end,
    eventually(fun() -> ?WRITER:waiters() =:= [] end),
    1 = ?WRITER:current(),
    ok = ?WRITER:release(),
    {ok, _} = ?WRITER:save(?STORE, disk, meta(), <<"payload">>).

%% A library that is in use is not replaced: who tries is told so, and all goes on.
the_library_is_loaded_twice(_Root) ->
    Holder = actor(),
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    {ok, Key} = ?WRITER:save(?STORE, disk, meta(), <<"payload">>),
    [{error, on_load_failure} = code:load_file(erllama_cache_nif) || _ <- [1, 2]],
    {ok, _, <<"payload">>} = erllama_cache_store:load(?STORE, Key),
    {ok, _} = ?WRITER:save(?STORE, disk, meta([1]), <<"payload">>),
    1 = ?WRITER:current(),
    ok = ask(Holder, fun() -> ?WRITER:release() end).

reload(Module) ->
    _ = code:purge(Module),
    {module, Module} = code:load_file(Module),
    _ = code:purge(Module).

%%% Memory

%% A megabyte, and a payload of many: what a save makes on its caller's heap is small.
a_caller_with_little_memory(_Root) ->
    Payload = rand:bytes(?LARGE),
    Size = #{size => (1 bsl 20) div erlang:system_info(wordsize), kill => true},
    {_, Monitor} = spawn_opt(fun() ->
        {ok, Key} = ?WRITER:save(?STORE, disk, meta(lists:seq(1, 4096)), Payload),
        {ok, _, Payload} = erllama_cache_store:load(?STORE, Key),
        exit(saved_and_loaded)
    end, [monitor, {max_heap_size, Size}]),
    receive {'DOWN', Monitor, process, _, saved_and_loaded} -> ok end.
