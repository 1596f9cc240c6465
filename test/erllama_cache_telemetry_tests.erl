%% Events for the library `telemetry', by which a node that does not have it is not troubled.
-module(erllama_cache_telemetry_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [meta/1, actor/0, ask/2, tell/2, answer/2, eventually/1]).
-import(erllama_cache_store_util, [running_tests/2]).

-define(WRITER, erllama_cache_writer).

%% What a handler would be called with is sent to who is registered.
-define(STAND_IN, [
    "-module(telemetry).", "-export([execute/3]).",
    "execute(Event, Measurements, Metadata) ->"
    "    listener ! {event, Event, Measurements, Metadata}, ok."
]).

telemetry_test_() ->
    running_tests(#{max_concurrent => 1}, [
        fun a_save_is_an_event/1,
        fun a_load_is_an_event/1,
        fun a_wait_is_an_event/1,
        fun an_eviction_is_an_event/1,
        fun what_is_raised_is_an_exception/1,
        fun without_the_library_there_is_none/1
    ]).

a_save_is_an_event(_Root) ->
    listening(fun() ->
        {ok, Key} = save(1, <<"payload">>),
        {Measurements, Metadata} = heard(save, stop),
        ?assertMatch(#{duration := D, wait := _, bytes := 7} when D > 0, Measurements),
        ?assertEqual(#{name => ?STORE, key => Key, result => ok}, Metadata),
        {error, already_present} = save(1, <<"payload">>),
        ?assertMatch({_, #{result := already_present}}, heard(save, stop))
    end).

a_load_is_an_event(_Root) ->
    {ok, Key} = save(1, <<"payload">>),
    listening(fun() ->
        {ok, _, _} = erllama_cache_store:load(?STORE, Key),
        ?assertMatch({#{duration := _, bytes := 7}, #{name := ?STORE, key := Key, result := ok}},
                     heard(load, stop)),
        miss = erllama_cache_reader:load(?STORE, <<1:256>>),
        ?assertMatch({_, #{key := <<1:256>>, result := miss}}, heard(load, stop))
    end).

a_wait_is_an_event(_Root) ->
    listening(fun() ->
        Holder = actor(),
        ok = ask(Holder, fun() -> ?WRITER:acquire(5000) end),
        Waiter = actor(),
        Waits = tell(Waiter, fun() -> ?WRITER:acquire(5000) end),
        eventually(fun() -> ?WRITER:waiters() =/= [] end),
        ok = ask(Holder, fun() -> ?WRITER:release() end),
        ok = answer(Waiter, Waits),
        ?assertMatch({#{duration := _}, #{weight := 1, result := ok}}, heard(wait, stop)),
        {error, max_concurrent} = ?WRITER:acquire(1),
        ?assertMatch({_, #{result := timed_out}}, heard(wait, stop))
    end).

an_eviction_is_an_event(Root) ->
    {ok, Key} = save(1, <<"payload">>),
    #{bytes := Bytes} = erllama_cache_store:info(?STORE),
    ok = gen_server:stop(?STORE),
    listening(fun() ->
        {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root, max_bytes => Bytes - 1}),
        ?assertEqual({#{bytes => Bytes}, #{name => ?STORE, key => Key}}, heard(evict, stop))
    end).

what_is_raised_is_an_exception(_Root) ->
    listening(fun() ->
        ?assertExit({noproc, _}, erllama_cache_store:load(no_such_store, <<1:256>>)),
        {#{duration := _}, Metadata} = heard(load, exception),
        ?assertMatch(#{kind := exit, reason := {noproc, _}, stacktrace := [_ | _],
                       name := no_such_store}, Metadata)
    end).

without_the_library_there_is_none(_Root) ->
    none = persistent_term:get(erllama_cache_telemetry),
    ok = erllama_cache_telemetry:event(save, stop, fun() -> error(nobody_listens) end).

save(N, Payload) ->
    ?WRITER:save(?STORE, disk, meta([N]), Payload).

heard(What, Suffix) ->
    receive
        {event, [erllama_cache, What, Suffix], Measurements, Metadata} -> {Measurements, Metadata}
    after 5000 ->
        error({not_heard, What, Suffix})
    end.

%% As if the library had been there when the first writer started.
listening(Fun) ->
    true = register(listener, self()),
    Forms = [
        begin
            {ok, Tokens, _} = erl_scan:string(Form),
            {ok, Parsed} = erl_parse:parse_form(Tokens),
            Parsed
        end
     || Form <- ?STAND_IN
    ],
    {ok, telemetry, Beam} = compile:forms(Forms),
    {module, telemetry} = code:load_binary(telemetry, "telemetry.erl", Beam),
    Before = persistent_term:get(erllama_cache_telemetry),
    true = persistent_term:erase(erllama_cache_telemetry),
    ok = erllama_cache_telemetry:setup(),
    try
        Fun()
    after
        ok = persistent_term:put(erllama_cache_telemetry, Before),
        true = unregister(listener),
        true = code:delete(telemetry),
        code:purge(telemetry)
    end.
