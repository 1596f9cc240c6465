%% Saves in the background: what the caller is told, and what is left when nobody waits any more.
-module(erllama_cache_background_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [own_messages/0, meta/1, eventually/1]).
-import(erllama_cache_hooked_host, [hold_turns/0, go_on/1]).
-import(erllama_cache_store_util, [running_tests/2]).

-define(WRITER, erllama_cache_writer).
-define(LARGE, (32 bsl 20)).

background_test_() ->
    running_tests(#{max_concurrent => 1}, [
        fun one_message_has_the_result/1,
        fun errors_are_reported/1,
        fun mistakes_raise/1,
        fun cancelled_while_it_waits/1,
        fun cancelled_while_it_writes/1,
        fun cancelled_too_late/1,
        fun the_callers_death_cancels/1,
        fun the_callers_normal_end_cancels/1,
        fun a_detached_save_goes_on/1,
        fun a_killed_saver_is_reported/1,
        fun the_payload_is_not_copied/1
    ]).

%% What the message of a save that has ended says.
result(Ref) ->
    receive
        {?WRITER, Ref, Result} -> Result
    after 10000 -> no_message
    end.

%% A result is never waited for in vain.
a_killed_saver_is_reported(Root) ->
    ok = ?WRITER:acquire(0),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), <<"payload">>),
    eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
    [#{pid := Saver}] = ?WRITER:waiters(),
    exit(Saver, kill),
    ?assertEqual({error, {saver_died, killed}}, result(Ref)),
    ok = ?WRITER:release(),
    assert_nothing_left(Root).

assert_nothing_left(Root) ->
    eventually(fun() ->
        #{reservations := Reservations} = erllama_cache_store:info(?STORE),
        {?WRITER:current(), ?WRITER:waiters(), Reservations} =:= {0, [], 0}
    end),
    ?assertEqual({ok, []}, file:list_dir(Root)),
    ?assertEqual([], own_messages()).

one_message_has_the_result(_Root) ->
    Payload = rand:bytes(?LARGE),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), Payload),
    ?assert(is_reference(Ref)),
    {ok, Key} = result(Ref),
    ?assertMatch({ok, _, Payload}, erllama_cache_store:load(?STORE, Key)),
    ?assertEqual([], own_messages()).

errors_are_reported(Root) ->
    {ok, Missing} = ?WRITER:save_async(?STORE, disk, maps:remove(tokens, meta([1])), <<"x">>),
    ?assertEqual({error, {missing_key, tokens}}, result(Missing)),
    {ok, Tier} = ?WRITER:save_async(?STORE, ram_file, meta([1]), <<"x">>),
    ?assertEqual({error, {wrong_tier, disk}}, result(Tier)),
    ok = ?WRITER:acquire(0),
    {ok, Busy} = ?WRITER:save_async(?STORE, disk, meta([1]), <<"x">>, #{timeout => 0}),
    ?assertEqual({error, max_concurrent}, result(Busy)),
    ok = ?WRITER:release(),
    {ok, Host} = ?WRITER:save_async(no_such_store, disk, meta([1]), <<"x">>),
    ?assertMatch({error, {raised, exit, {noproc, _}, [_ | _]}}, result(Host)),
    assert_nothing_left(Root).

mistakes_raise(_Root) ->
    Save = fun(Tier, Opts) -> ?WRITER:save_async(?STORE, Tier, meta([1]), <<"x">>, Opts) end,
    ?assertError(function_clause, Save(ram, #{})),
    ?assertError(badarg, Save(disk, #{timeout => -1})),
    ?assertError(badarg, Save(disk, #{detach => yes})),
    ?assertError(function_clause, ?WRITER:cancel(self())).

cancelled_while_it_waits(Root) ->
    ok = ?WRITER:acquire(0),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), <<"x">>),
    eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
    ok = ?WRITER:cancel(Ref),
    ?assertEqual({error, cancelled}, result(Ref)),
    ok = ?WRITER:release(),
    assert_nothing_left(Root).

%% Its slices wait for a turn that this process holds all of.
cancelled_while_it_writes(Root) ->
    Turns = hold_turns(),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), rand:bytes(?LARGE)),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    ok = ?WRITER:cancel(Ref),
    ok = go_on(Turns),
    ?assertEqual({error, cancelled}, result(Ref)),
    assert_nothing_left(Root).

cancelled_too_late(_Root) ->
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), <<"x">>),
    ?assertMatch({ok, _}, result(Ref)),
    ok = ?WRITER:cancel(Ref),
    ok = ?WRITER:cancel(make_ref()),
    ?assertEqual([], own_messages()).

the_callers_death_cancels(Root) ->
    Turns = hold_turns(),
    Caller = caller(#{}, rand:bytes(?LARGE)),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    exit(Caller, kill),
    ok = go_on(Turns),
    assert_nothing_left(Root).

the_callers_normal_end_cancels(Root) ->
    Turns = hold_turns(),
    Caller = caller(#{}, rand:bytes(?LARGE)),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    Caller ! stop,
    eventually(fun() -> not is_process_alive(Caller) end),
    ok = go_on(Turns),
    assert_nothing_left(Root).

a_detached_save_goes_on(_Root) ->
    Turns = hold_turns(),
    Payload = rand:bytes(?LARGE),
    Caller = caller(#{detach => true}, Payload),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    exit(Caller, kill),
    ok = go_on(Turns),
    {ok, Key} = erllama_cache_store:key(meta([1])),
    eventually(fun() -> erllama_cache_store:load(?STORE, Key) =/= miss end),
    ?assertMatch({ok, _, Payload}, erllama_cache_store:load(?STORE, Key)).

the_payload_is_not_copied(_Root) ->
    Payload = binary:copy(<<7>>, ?LARGE),
    Turns = hold_turns(),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), Payload),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    [#{pid := Saver}] = ?WRITER:holders(),
    {binary, Saved} = process_info(Saver, binary),
    {binary, Ours} = process_info(self(), binary),
    Id = fun(Binaries) -> [I || {I, Size, _} <- Binaries, Size =:= ?LARGE] end,
    [Same] = lists:usort(Id(Ours)),
    ?assertEqual([Same], lists:usort(Id(Saved))),
    %% It has to be ours until here.
    ?assertEqual(?LARGE, byte_size(Payload)),
    ok = go_on(Turns),
    ?assertMatch({ok, _}, result(Ref)).

caller(Opts, Payload) ->
    spawn(fun() ->
        {ok, _Ref} = ?WRITER:save_async(?STORE, disk, meta([1]), Payload, Opts),
        receive stop -> ok end
    end).
