%% Saves that go on behind their callers, inside erllama.
-module(erllama_cache_behind_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [
    files/1, open_files/1, file_of/2, eventually/1, logged/1, actor/0, ask/2, tell/2, answer/2,
    kill/1, own_messages/0, stop/1
]).
-import(erllama_cache_erllama_util, [meta/1, restart_writer/1, start_writer/1, args/1, by_kind/2]).
-import(erllama_cache_hooked_host, [hold_turns/0, go_on/1]).

-define(READER, erllama_cache_reader).
-define(LARGE, (4 bsl 20)).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        answers_before_there_is_a_file,
        other_reasons_stay_in_line,
        a_large_payload_stays_in_line,
        as_many_as_may_be_are_pending,
        as_many_bytes_as_may_be_are_pending,
        a_pending_key_is_already_present,
        a_pending_key_is_already_present_in_line,
        what_another_process_has_reserved_is_a_conflict,
        what_fails_before_the_answer_is_answered,
        what_raises_before_the_answer_is_raised,
        nothing_is_saved_without_a_writer,
        the_callers_death_stops_nothing,
        the_writers_crash_stops_nothing,
        a_killed_saver_leaves_nothing_and_is_counted,
        a_killed_owner_stops_nothing,
        a_killed_pending_set_stops_nothing,
        a_failure_afterwards_is_logged_and_counted,
        a_lost_reservation_is_a_failure,
        a_pending_key_is_loaded_from_memory,
        a_pending_key_is_loaded_from_memory_by_a_store,
        a_load_waits_for_the_disk,
        others_are_served_before_what_is_pending,
        others_wait_for_a_slot_so_long,
        the_lease_is_renewed_meanwhile,
        flush_says_how_many_are_left,
        flush_waits_for_detached_saves,
        a_stopped_writer_waits_for_what_is_pending,
        the_application_waits_for_the_rest,
        the_application_says_what_it_leaves,
        what_is_pending_is_shown,
        the_tokens_are_not_copied,
        what_has_waited_does_not_rest,
        the_configuration_is_checked
    ]).

%%% The answer

answers_before_there_is_a_file(Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(continued, [1]), ?PAYLOAD),
    ?assertEqual([], files(root(Config))),
    ?assertMatch(#{pending := 1, pending_bytes := 9}, ?WRITER:info()),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    ?assertEqual([filename:basename(file_of(root(Config), Key))], files(root(Config))),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_disk_srv:load(?TIER, Key)),
    ?assertMatch(#{5 := 1}, erllama_cache_counters:all()),
    ?assertMatch(#{pending := 0, current := 0, dropped := 0}, since_the_start()),
    ?assertEqual([], own_messages()).

other_reasons_stay_in_line(Config) ->
    ok = behind(#{reasons => [cold]}),
    {ok, Key} = save(meta(evict, [1]), binary:copy(<<7>>, ?LARGE)),
    ?assertEqual([filename:basename(file_of(root(Config), Key))], files(root(Config))),
    {ok, Finish} = save(meta(finish, [2]), ?PAYLOAD),
    ?assertMatch({ok, _, _}, erllama_cache_disk_srv:load(?TIER, Finish)),
    ?assertEqual([self(), self()], reservers()).

a_large_payload_stays_in_line(_Config) ->
    ok = behind(#{save_bytes => 100}),
    {ok, _} = save(meta(cold, [1]), <<0:800>>),
    ok = ?WRITER:flush(infinity),
    [Saver] = reservers(),
    ?assertNotEqual(self(), Saver),
    ok = erllama_fake:forget_calls(),
    {ok, _} = save(meta(cold, [2]), <<0:808>>),
    ?assertEqual([self()], reservers()),
    %% It could never have a place.
    ok = behind(#{max_bytes => 100}),
    ok = erllama_fake:forget_calls(),
    {ok, _} = save(meta(cold, [3]), <<0:808>>),
    ?assertEqual([self()], reservers()).

as_many_as_may_be_are_pending(_Config) ->
    ok = behind(#{max => 2}),
    ok = ?WRITER:acquire(0),
    {ok, _} = save(meta(cold, [1]), ?PAYLOAD),
    {ok, _} = save(meta(cold, [2]), ?PAYLOAD),
    ok = erllama_fake:forget_calls(),
    #{refused := Before} = ?WRITER:info(),
    ?assertEqual({error, max_concurrent}, save(meta(cold, [3]), ?PAYLOAD)),
    ?assertEqual([], args(reserve_save)),
    ?assertMatch(#{refused := Refused} when Refused =:= Before + 1, ?WRITER:info()),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    {ok, _} = save(meta(cold, [3]), ?PAYLOAD),
    ok = ?WRITER:flush(infinity).

as_many_bytes_as_may_be_are_pending(_Config) ->
    ok = behind(#{max_bytes => 1000}),
    ok = ?WRITER:acquire(0),
    {ok, _} = save(meta(cold, [1]), <<0:(8 * 600)>>),
    ?assertEqual({error, max_concurrent}, save(meta(cold, [2]), <<0:(8 * 401)>>)),
    {ok, _} = save(meta(cold, [3]), <<0:(8 * 400)>>),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity).

a_pending_key_is_already_present(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(cold, [1]), ?PAYLOAD),
    ?assertEqual({error, already_present}, save(meta(continued, [1]), ?PAYLOAD)),
    ?assertMatch(#{16 := 1}, erllama_cache_counters:all()),
    ?assertMatch([[Key | _]], args(reserve_save)),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    ?assertEqual({error, already_present}, save(meta(continued, [1]), ?PAYLOAD)),
    ?assertMatch(#{16 := 2}, erllama_cache_counters:all()).

a_pending_key_is_already_present_in_line(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:set_max_concurrent(2),
    Turns = hold_turns(),
    Payload = binary:copy(<<7>>, ?LARGE),
    {ok, _} = save(meta(cold, [1]), Payload),
    ?assertEqual({error, already_present}, save(meta(evict, [1]), Payload)),
    ?assertMatch(#{16 := 1}, erllama_cache_counters:all()),
    ok = go_on(Turns),
    ok = ?WRITER:flush(infinity).

what_another_process_has_reserved_is_a_conflict(_Config) ->
    ok = behind(#{}),
    {ok, Key} = save(meta(evict, [1]), ?PAYLOAD),
    ok = erllama_fake:script(reserve_save, [{return, {error, conflict}}]),
    ?assertEqual({error, conflict}, save(meta(cold, [2]), ?PAYLOAD)),
    ?assertMatch(#{pending := 0}, ?WRITER:info()),
    {ok, Other} = save(meta(cold, [2]), ?PAYLOAD),
    ?assertNotEqual(Key, Other),
    ok = ?WRITER:flush(infinity).

what_fails_before_the_answer_is_answered(Config) ->
    ok = behind(#{}),
    #{save_errors := Before} = ?WRITER:info(),
    Missing = by_kind(tokens, fingerprint),
    ?assertEqual({error, {missing_key, Missing}},
                 save(maps:remove(Missing, meta(cold, [1])), ?PAYLOAD)),
    ok = erllama_cache_erllama_util:script_dir([{return, "with a \0"}]),
    ?assertEqual({error, badarg}, save(meta(cold, [1]), ?PAYLOAD)),
    ?assertMatch(#{save_errors := Errors, pending := 0} when Errors =:= Before + 2, ?WRITER:info()),
    ?assertEqual([], ?META_SRV:reserved()),
    ?assertEqual([], files(root(Config))),
    ?assertEqual([], own_messages()).

what_raises_before_the_answer_is_raised(_Config) ->
    ok = behind(#{}),
    ?assertExit({noproc, _}, ?WRITER:save(no_such_tier, disk, meta(cold, [1]), ?PAYLOAD, 0)),
    ok = erllama_fake:script(reserve_save, [{raise, error, oops}]),
    ?assertError(oops, save(meta(cold, [2]), ?PAYLOAD)),
    ?assertMatch(#{pending := 0, current := 0}, ?WRITER:info()),
    eventually(fun() -> ?META_SRV:reserved() =:= [] end),
    {ok, _} = save(meta(cold, [2]), ?PAYLOAD),
    ok = ?WRITER:flush(infinity).

nothing_is_saved_without_a_writer(_Config) ->
    ok = behind(#{}),
    ok = stop(?WRITER),
    ok = erllama_fake:forget_calls(),
    ?assertExit({noproc, {?WRITER, save, _}}, save(meta(cold, [1]), ?PAYLOAD)),
    ?assertEqual([], args(reserve_save)),
    ?assertEqual(ok, ?WRITER:flush(0)),
    _ = start_writer(?LIMIT).

%%% Who may end

the_callers_death_stops_nothing(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    Caller = actor(),
    {ok, Key} = ask(Caller, fun() -> save(meta(cold, [1]), ?PAYLOAD) end),
    ok = kill(Caller),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_disk_srv:load(?TIER, Key)).

the_writers_crash_stops_nothing(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(cold, [1]), ?PAYLOAD),
    ok = kill(whereis(?WRITER)),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_disk_srv:load(?TIER, Key)),
    _ = start_writer(?LIMIT).

a_killed_saver_leaves_nothing_and_is_counted(Config) ->
    ok = behind(#{}),
    Payload = binary:copy(<<7>>, ?LARGE),
    Turns = hold_turns(),
    {ok, Key} = save(meta(cold, [1]), Payload),
    [#{pid := Saver}] = ?WRITER:holders(),
    [Report] = logged(fun() ->
        ok = kill(Saver),
        ok = go_on(Turns),
        ok = ?WRITER:flush(infinity)
    end),
    Hex = erllama_cache_log:hex(Key),
    ?assertMatch(#{event := save_dropped, key := Hex, tier_srv := ?TIER, save_reason := cold,
                   payload_bytes := ?LARGE, reason := {saver_died, killed}}, Report),
    ?assertMatch(#{20 := 1}, erllama_cache_counters:all()),
    ?assertMatch(#{dropped := 1, current := 0, pending := 0}, since_the_start()),
    eventually(fun() -> {files(root(Config)), open_files(root(Config))} =:= {[], []} end),
    eventually(fun() -> ?META_SRV:reserved() =:= [] end),
    {ok, Key} = save(meta(cold, [1]), Payload),
    ok = ?WRITER:flush(infinity),
    ?assertMatch({ok, _, Payload}, ?READER:load(?TIER, Key)).

%% It does nothing for which it could be killed. If it is, the save ends well.
a_killed_owner_stops_nothing(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(cold, [1]), ?PAYLOAD),
    {ok, _, _, Owner} = erllama_cache_pending:find(erllama_cache_host_erllama, Key),
    ok = kill(Owner),
    ok = ?WRITER:release(),
    eventually(fun() -> ?META_SRV:stored() =:= [Key] end).

a_killed_pending_set_stops_nothing(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(cold, [1]), ?PAYLOAD),
    ok = kill(whereis(erllama_cache_pending)),
    ?assertMatch(#{pending := 0}, ?WRITER:info()),
    {ok, Other} = save(meta(cold, [2]), ?PAYLOAD),
    ?assertMatch(#{pending := 1}, ?WRITER:info()),
    ok = ?WRITER:release(),
    eventually(fun() -> lists:sort(?META_SRV:stored()) =:= lists:sort([Key, Other]) end),
    ok = ?WRITER:flush(infinity).

%%% Failures afterwards

a_failure_afterwards_is_logged_and_counted(Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    ok = erllama_cache_erllama_util:script_dir([{return, filename:join(root(Config), "gone")}]),
    {ok, Key} = save(meta(finish, [1]), ?PAYLOAD),
    [Report] = logged(fun() ->
        ok = ?WRITER:release(),
        ok = ?WRITER:flush(infinity)
    end),
    Hex = erllama_cache_log:hex(Key),
    ?assertMatch(#{event := save_dropped, key := Hex, reason := enoent, save_reason := finish},
                 Report),
    ?assertMatch(#{20 := 1}, erllama_cache_counters:all()),
    ?assertMatch(#{dropped := 1}, since_the_start()),
    ?assertEqual([], ?META_SRV:reserved()).

a_lost_reservation_is_a_failure(Config) ->
    ok = behind(#{}),
    ok = erllama_fake:script(check_reservation, [{return, {error, expired}}]),
    [#{event := save_dropped, reason := expired}] = logged(fun() ->
        {ok, _} = save(meta(finish, [1]), ?PAYLOAD),
        ok = ?WRITER:flush(infinity)
    end),
    ?assertEqual([], files(root(Config))),
    ?assertEqual([], args(cancel_reservation)).

%%% Loads

a_pending_key_is_loaded_from_memory(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    Payload = binary:copy(<<7>>, ?LARGE),
    [begin
        {ok, Key} = save(Meta, Payload),
        {ok, FromMemory, Loaded} = ?READER:load(?TIER, Key),
        ?assertEqual(Payload, Loaded),
        %% The same bytes, not others that are equal.
        ?assertMatch([_], lists:usort([Id || {Id, ?LARGE, _} <- binaries()])),
        ok = ?WRITER:release(),
        ok = ?WRITER:flush(infinity),
        {ok, FromDisk, Payload} = ?READER:load(?TIER, Key),
        ?assertEqual(FromDisk, FromMemory),
        true = garbage_collect(),
        ok = ?WRITER:acquire(0)
     end || Meta <- descriptions()],
    ok = ?WRITER:release().

%% What differs in the lengths of what the file has beside the payload.
descriptions() ->
    Whole = (meta(cold, [4]))#{
        prompt_text => <<"Once upon a time">>, hostname => <<"h">>, erllama_version => <<"0.5">>,
        save_reason_detail => <<"because">>, hit_count => 7, creation_time => 1000
    },
    [
        meta(cold, [1]),
        meta(continued, [2, -1, 16#ffffffffff]),
        (meta(finish, [3]))#{hostname => <<>>, erllama_version => <<>>},
        Whole,
        Whole#{tokens => [5], prompt_text => <<"5">>, quant_type => f16, quant_bits => 16}
    ].

binaries() ->
    {binary, Binaries} = process_info(self(), binary),
    Binaries.

a_pending_key_is_loaded_from_memory_by_a_store(Config) ->
    ok = behind(#{}),
    Root = filename:join(root(Config), "store"),
    ok = file:make_dir(Root),
    {ok, _} = erllama_cache_store:start_link(behind_store, #{root => Root}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = ?WRITER:save(behind_store, disk, meta(cold, [1]), ?PAYLOAD),
    {ok, Info, ?PAYLOAD} = erllama_cache_store:load(behind_store, Key),
    ?assertMatch({ok, Info, ?PAYLOAD}, ?READER:load(behind_store, Key)),
    ?assertEqual({error, timeout}, ?READER:load(behind_store, Key, #{wait => 0})),
    %% It is not pending in any other store, nor in erllama.
    ?assertEqual(miss, ?READER:load(?TIER, Key)),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    ?assertEqual({ok, Info, ?PAYLOAD}, erllama_cache_store:load(behind_store, Key)),
    ?assertMatch(#{hits := 3}, erllama_cache_store:info(behind_store)),
    %% Another host's file.
    ok = erllama_cache_store:delete(behind_store, Key),
    ok = gen_server:stop(behind_store).

a_load_waits_for_the_disk(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(cold, [1]), ?PAYLOAD),
    ?assertEqual({error, timeout}, ?READER:load(?TIER, Key, #{wait => 1})),
    Reader = actor(),
    Load = tell(Reader, fun() -> ?READER:load(?TIER, Key, #{wait => infinity}) end),
    eventually(fun() -> process_info(Reader, status) =:= {status, waiting} end),
    ok = ?WRITER:release(),
    ?assertMatch({ok, _, ?PAYLOAD}, answer(Reader, Load)),
    ?assertMatch({ok, _, ?PAYLOAD}, ?READER:load(?TIER, Key, #{wait => 0})),
    ?assertEqual(miss, ?READER:load(?TIER, <<7:256>>, #{wait => 1000})).

%%% Slots

others_are_served_before_what_is_pending(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Pending} = save(meta(cold, [1]), ?PAYLOAD),
    eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
    Model = actor(),
    %% The host gives it no time at all.
    Evict = tell(Model, fun() -> save(meta(evict, [2]), ?PAYLOAD) end),
    eventually(fun() -> length(?WRITER:waiters()) =:= 2 end),
    ?assertMatch([#{pid := Model}, _], ?WRITER:waiters()),
    ok = ?WRITER:release(),
    {ok, Evicted} = answer(Model, Evict),
    ok = ?WRITER:flush(infinity),
    ?assertMatch([[Evicted | _], [Pending | _]], args(announce_saved)).

others_wait_for_a_slot_so_long(_Config) ->
    ok = behind(#{slot_ms => 1}),
    ok = ?WRITER:acquire(0),
    #{timed_out := Before} = ?WRITER:info(),
    ?assertEqual({error, max_concurrent}, save(meta(evict, [1]), ?PAYLOAD)),
    ?assertMatch(#{timed_out := TimedOut} when TimedOut =:= Before + 1, ?WRITER:info()),
    ok = ?WRITER:release().

the_lease_is_renewed_meanwhile(Config) ->
    Root = root(Config),
    erllama_cache_erllama_util:on_peer(["erl"], fun() ->
        ok = erllama_cache_erllama_util:renew_every(2),
        ok = erllama_fake:start(?TIER, Root),
        _ = start_writer(?LIMIT),
        ok = behind(#{}),
        ok = ?WRITER:acquire(0),
        {ok, _} = save(meta(cold, [1]), ?PAYLOAD),
        eventually(fun() -> length(args(check_reservation)) >= 3 end),
        [#{reason := expired}] = logged(fun() ->
            ok = erllama_fake:script(check_reservation, [{return, {error, expired}}]),
            ok = ?WRITER:flush(infinity)
        end),
        ?assertEqual([], ?WRITER:waiters()),
        ok = ?WRITER:release()
    end).

%%% Flush and shutdown

flush_says_how_many_are_left(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    ?assertEqual(ok, ?WRITER:flush(0)),
    {ok, _} = save(meta(cold, [1]), ?PAYLOAD),
    {ok, _} = save(meta(cold, [2]), ?PAYLOAD),
    ?assertEqual({error, {pending, 2}}, ?WRITER:flush(0)),
    ?assertEqual({error, {pending, 2}}, ?WRITER:flush(1)),
    ok = ?WRITER:release(),
    ?assertEqual(ok, ?WRITER:flush(infinity)),
    ?assertError(function_clause, ?WRITER:flush(-1)).

flush_waits_for_detached_saves(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    {ok, Ref} = ?WRITER:save_async(?TIER, disk, meta(cold, [1]), ?PAYLOAD, #{detach => true}),
    ?assertEqual({error, {pending, 1}}, ?WRITER:flush(0)),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity),
    ?assertMatch([{?WRITER, Ref, {ok, _}}], own_messages()).

a_stopped_writer_waits_for_what_is_pending(_Config) ->
    ok = behind(#{}),
    ok = ?WRITER:acquire(0),
    {ok, Key} = save(meta(cold, [1]), ?PAYLOAD),
    {ok, Ref} = ?WRITER:save_async(?TIER, disk, meta(cold, [2]), ?PAYLOAD, #{detach => true}),
    eventually(fun() -> length(?WRITER:waiters()) =:= 2 end),
    %% The slot is still held: nobody else saves any more, so they need none.
    ok = gen_server:stop(?WRITER, shutdown, 20000),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_disk_srv:load(?TIER, Key)),
    ?assertMatch([{?WRITER, Ref, {ok, _}}], own_messages()),
    _ = start_writer(?LIMIT),
    ok = ?WRITER:release().

%% Writer and host have been stopped.
the_application_waits_for_the_rest(Config) ->
    ok = behind(#{}),
    Payload = binary:copy(<<7>>, ?LARGE),
    {ok, Drain} = erllama_cache_drain:start_link(),
    true = unlink(Drain),
    Turns = hold_turns(),
    {ok, Key} = save(meta(cold, [1]), Payload),
    ok = kill(whereis(?WRITER)),
    ok = gen_server:stop(?META_SRV),
    ok = gen_server:stop(?TIER),
    Stopper = actor(),
    Stop = tell(Stopper, fun() -> gen_server:stop(Drain, shutdown, infinity) end),
    eventually(fun() -> {status, waiting} =:= process_info(Drain, status) end),
    [] = logged(fun() ->
        ok = go_on(Turns),
        ok = answer(Stopper, Stop)
    end),
    %% The host finds it when it starts again.
    ?assertEqual([filename:basename(file_of(root(Config), Key))], files(root(Config))),
    {ok, _} = erllama_cache_meta_srv:start(),
    {ok, _} = erllama_cache_disk_srv:start(?TIER, root(Config)),
    ?assertMatch({ok, _, Payload}, erllama_cache_disk_srv:load(?TIER, Key)),
    _ = start_writer(?LIMIT).

the_application_says_what_it_leaves(_Config) ->
    ok = behind(#{}, #{drain_ms => 1}),
    {ok, Drain} = erllama_cache_drain:start_link(),
    true = unlink(Drain),
    ok = ?WRITER:acquire(0),
    {ok, _} = save(meta(cold, [1]), ?PAYLOAD),
    Reports = logged(fun() -> ok = gen_server:stop(Drain, shutdown, infinity) end),
    ?assertEqual([#{event => saves_left, saves => 1, pending_bytes => 9}], Reports),
    ok = ?WRITER:release(),
    ok = ?WRITER:flush(infinity).

%%% Looking

what_is_pending_is_shown(_Config) ->
    ok = behind(#{}),
    Turns = hold_turns(),
    {ok, _} = save(meta(cold, [1]), binary:copy(<<7>>, ?LARGE)),
    eventually(fun() ->
        #{oldest_pending_ms := Oldest} = ?WRITER:info(),
        Oldest > 0
    end),
    ?assertMatch(#{pending := 1, pending_bytes := ?LARGE}, ?WRITER:info()),
    ?assertMatch([#{behind := true, bytes := ?LARGE}], ?WRITER:holders()),
    Metrics = iolist_to_binary(erllama_cache_metrics:format()),
    ?assertMatch({_, _}, binary:match(Metrics, <<"erllama_cache_pending 1\n">>)),
    ok = go_on(Turns),
    ok = ?WRITER:flush(infinity),
    ?assertEqual({ok, [#{behind => false, pid => self()}]}, ?WRITER:with_slot(0, fun() ->
        [maps:with([behind, pid], Row) || Row <- ?WRITER:holders()]
    end)).

%% Or the pending set would fill up where saves queue.
what_has_waited_does_not_rest(_Config) ->
    ok = behind(#{share => 7}),
    Payload = binary:copy(<<7>>, ?LARGE),
    ?assertEqual([7], efforts(fun() -> {ok, _} = save(meta(cold, [1]), Payload) end)),
    #{limit := Limit} = ?WRITER:info(),
    ?assertEqual([100], efforts(fun() ->
        ok = ?WRITER:acquire(0, #{weight => Limit}),
        {ok, _} = save(meta(cold, [2]), Payload),
        ok = ?WRITER:release()
    end)).

%% How much of a processor the saves take that begin meanwhile, as the library is told.
efforts(Fun) ->
    Write = {erllama_cache_nif, write_tmp, 5},
    1 = erlang:trace_pattern(Write, true, [global]),
    _ = erlang:trace(new, true, [call]),
    try
        _ = Fun(),
        ok = ?WRITER:flush(infinity),
        traced_efforts()
    after
        _ = erlang:trace(new, false, [call]),
        erlang:trace_pattern(Write, false, [global])
    end.

traced_efforts() ->
    receive
        {trace, _Saver, call, {_, write_tmp, [_Turn, _Guard, _Root, Plan, _Payload]}} ->
            {_Mode, _Digest, _PageCache, Effort} = element(6, Plan),
            [Effort | traced_efforts()]
    after 0 -> []
    end.

%% The saver has the encoded tokens, which are not on its heap.
the_tokens_are_not_copied(_Config) ->
    ok = behind(#{}),
    Turns = hold_turns(),
    {ok, _} = save(meta(cold, lists:seq(1, 100000)), binary:copy(<<7>>, ?LARGE)),
    [#{pid := Saver}] = ?WRITER:holders(),
    {total_heap_size, Words} = process_info(Saver, total_heap_size),
    ?assert(Words < 20000),
    ok = go_on(Turns),
    ok = ?WRITER:flush(infinity).

the_configuration_is_checked(_Config) ->
    Start = fun(Config) -> ?WRITER:start_link(Config) end,
    ?assertError({invalid_config, write_behind, true}, Start(#{write_behind => true})),
    ?assertError({unknown_config, reason, reasons}, Start(#{write_behind => #{reason => [cold]}})),
    ?assertError({invalid_config, {write_behind, reasons}, [warm]},
                 Start(#{write_behind => #{reasons => [warm]}})),
    ?assertError({invalid_config, {write_behind, reasons}, cold},
                 Start(#{write_behind => #{reasons => cold}})),
    [?assertError({invalid_config, {write_behind, Key}, Value},
                  Start(#{write_behind => #{Key => Value}}))
     || {Key, Value} <- [{max, 0}, {max_bytes, -1}, {save_bytes, infinity}, {slot_ms, soon},
                        {share, 0}, {share, 101}, {share, 0.5}]],
    ?assertError({invalid_config, drain_ms, infinity}, Start(#{drain_ms => infinity})).

%%% In short

behind(WriteBehind) ->
    behind(WriteBehind, #{}).

%% One slot, so that a test which holds it holds up all saves.
behind(WriteBehind, More) ->
    _ = restart_writer(More#{max_concurrent => 1, write_behind => WriteBehind}),
    #{dropped := Dropped} = ?WRITER:info(),
    _ = put(dropped, Dropped),
    ok.

root(Config) ->
    ?config(root, Config).

meta(Reason, Tokens) ->
    (meta(Tokens))#{save_reason := Reason}.

%% As the host saves: it has no time to wait.
save(Meta, Payload) ->
    ?WRITER:save(?TIER, disk, Meta, Payload, 0).

%% What the writer says, but for failures of cases before this one.
since_the_start() ->
    #{dropped := Dropped} = Info = ?WRITER:info(),
    Info#{dropped := Dropped - get(dropped)}.

%% The processes that have reserved something.
reservers() ->
    [Pid || [_Key, _Tier, Pid] <- args(reserve_save)].
