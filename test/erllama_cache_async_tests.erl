%% Saves in the background: what the caller is told, and what is left when nobody waits any more.
-module(erllama_cache_async_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [own_messages/0]).

-define(WRITER, erllama_cache_writer).
-define(STORE, async_store).
-define(LARGE, (32 bsl 20)).

async_test_() ->
    {foreach, fun setup/0, fun teardown/1, [
        fun(Root) -> {atom_to_list(Name), {timeout, 60, fun() -> Test(Root) end}} end
     || {Name, Test} <- tests()
    ]}.

tests() ->
    [
        {one_message_tells_the_result, fun one_message_tells_the_result/1},
        {errors_are_told, fun errors_are_told/1},
        {mistakes_raise, fun mistakes_raise/1},
        {cancelled_while_it_waits, fun cancelled_while_it_waits/1},
        {cancelled_while_it_writes, fun cancelled_while_it_writes/1},
        {cancelled_too_late, fun cancelled_too_late/1},
        {the_callers_death_cancels, fun the_callers_death_cancels/1},
        {the_callers_normal_end_cancels, fun the_callers_normal_end_cancels/1},
        {detached_it_goes_on, fun detached_it_goes_on/1},
        {a_killed_saver_is_told_of, fun a_killed_saver_is_told_of/1},
        {the_payload_is_not_copied, fun the_payload_is_not_copied/1}
    ].

setup() ->
    Root = filename:join("/tmp", "erllama_cache_async." ++ os:getpid()),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    {ok, _} = ?WRITER:start_link(#{host => erllama_cache_store, max_concurrent => 1}),
    Root.

teardown(Root) ->
    ok = gen_server:stop(?WRITER),
    ok = gen_server:stop(?STORE),
    ok = file:del_dir_r(Root).

meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<N:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, tokens => [1, 2, N],
        context_size => 4096
    }.

result(Ref) ->
    receive
        {?WRITER, Ref, Result} -> Result
    after 10000 -> no_message
    end.

%% A result is never waited for in vain.
a_killed_saver_is_told_of(Root) ->
    ok = ?WRITER:acquire(0),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(1), <<"payload">>),
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

eventually(Fun) ->
    eventually(Fun, erlang:monotonic_time(millisecond) + 10000).

eventually(Fun, Deadline) ->
    case Fun() of
        true ->
            ok;
        false ->
            ?assert(erlang:monotonic_time(millisecond) < Deadline),
            receive after 1 -> eventually(Fun, Deadline) end
    end.

one_message_tells_the_result(_Root) ->
    Payload = rand:bytes(?LARGE),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(1), Payload),
    ?assert(is_reference(Ref)),
    {ok, Key} = result(Ref),
    ?assertMatch({ok, _, Payload}, erllama_cache_store:load(?STORE, Key)),
    ?assertEqual([], own_messages()).

errors_are_told(Root) ->
    {ok, Missing} = ?WRITER:save_async(?STORE, disk, maps:remove(tokens, meta(1)), <<"x">>),
    ?assertEqual({error, {missing_key, tokens}}, result(Missing)),
    {ok, Tier} = ?WRITER:save_async(?STORE, ram_file, meta(1), <<"x">>),
    ?assertEqual({error, {wrong_tier, disk}}, result(Tier)),
    ok = ?WRITER:acquire(0),
    {ok, Busy} = ?WRITER:save_async(?STORE, disk, meta(1), <<"x">>, #{timeout => 0}),
    ?assertEqual({error, max_concurrent}, result(Busy)),
    ok = ?WRITER:release(),
    {ok, Host} = ?WRITER:save_async(no_such_store, disk, meta(1), <<"x">>),
    ?assertMatch({error, {raised, exit, {noproc, _}, [_ | _]}}, result(Host)),
    assert_nothing_left(Root).

mistakes_raise(_Root) ->
    Save = fun(Tier, Opts) -> ?WRITER:save_async(?STORE, Tier, meta(1), <<"x">>, Opts) end,
    ?assertError(function_clause, Save(ram, #{})),
    ?assertError(badarg, Save(disk, #{timeout => -1})),
    ?assertError(badarg, Save(disk, #{detach => yes})),
    ?assertError(function_clause, ?WRITER:cancel(self())).

cancelled_while_it_waits(Root) ->
    ok = ?WRITER:acquire(0),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(1), <<"x">>),
    eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
    ok = ?WRITER:cancel(Ref),
    ?assertEqual({error, cancelled}, result(Ref)),
    ok = ?WRITER:release(),
    assert_nothing_left(Root).

%% Its slices wait for a turn that this process holds all of.
cancelled_while_it_writes(Root) ->
    Turns = hold_all_turns(),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(1), rand:bytes(?LARGE)),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    ok = ?WRITER:cancel(Ref),
    give_turns_back(Turns),
    ?assertEqual({error, cancelled}, result(Ref)),
    assert_nothing_left(Root).

cancelled_too_late(_Root) ->
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(1), <<"x">>),
    ?assertMatch({ok, _}, result(Ref)),
    ok = ?WRITER:cancel(Ref),
    ok = ?WRITER:cancel(make_ref()),
    ?assertEqual([], own_messages()).

the_callers_death_cancels(Root) ->
    Turns = hold_all_turns(),
    Caller = caller(#{}, rand:bytes(?LARGE)),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    exit(Caller, kill),
    give_turns_back(Turns),
    assert_nothing_left(Root).

the_callers_normal_end_cancels(Root) ->
    Turns = hold_all_turns(),
    Caller = caller(#{}, rand:bytes(?LARGE)),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    Caller ! stop,
    eventually(fun() -> not is_process_alive(Caller) end),
    give_turns_back(Turns),
    assert_nothing_left(Root).

detached_it_goes_on(_Root) ->
    Turns = hold_all_turns(),
    Payload = rand:bytes(?LARGE),
    Caller = caller(#{detach => true}, Payload),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    exit(Caller, kill),
    give_turns_back(Turns),
    {ok, Key} = erllama_cache_store:key(meta(1)),
    eventually(fun() -> erllama_cache_store:load(?STORE, Key) =/= miss end),
    ?assertMatch({ok, _, Payload}, erllama_cache_store:load(?STORE, Key)).

the_payload_is_not_copied(_Root) ->
    Payload = binary:copy(<<7>>, ?LARGE),
    Turns = hold_all_turns(),
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(1), Payload),
    eventually(fun() -> ?WRITER:current() =:= 1 end),
    [#{pid := Saver}] = ?WRITER:holders(),
    {binary, Saved} = process_info(Saver, binary),
    {binary, Ours} = process_info(self(), binary),
    Id = fun(Binaries) -> [I || {I, Size, _} <- Binaries, Size =:= ?LARGE] end,
    [Same] = lists:usort(Id(Ours)),
    ?assertEqual([Same], lists:usort(Id(Saved))),
    %% It has to be ours until here.
    ?assertEqual(?LARGE, byte_size(Payload)),
    give_turns_back(Turns),
    ?assertMatch({ok, _}, result(Ref)).

caller(Opts, Payload) ->
    spawn(fun() ->
        {ok, _Ref} = ?WRITER:save_async(?STORE, disk, meta(1), Payload, Opts),
        receive stop -> ok end
    end).

%% A process that has taken every turn there is, so that no slice begins.
hold_all_turns() ->
    Self = self(),
    Holder = spawn_link(fun() -> hold_turns(Self, erlang:system_info(dirty_io_schedulers) - 2) end),
    receive {Holder, held} -> Holder end.

hold_turns(Test, 0) ->
    Test ! {self(), held},
    receive {Test, give_back} -> ok end,
    Test ! {self(), given_back};
hold_turns(Test, More) ->
    erllama_cache_io_limit:run(fun(_Turn) -> hold_turns(Test, More - 1) end).

give_turns_back(Holder) ->
    Holder ! {self(), give_back},
    receive {Holder, given_back} -> ok end.
