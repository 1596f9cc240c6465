%% Slots come back and waiters are woken, whatever happens to whom: owners killed in the middle of
%% a write, time-outs at the moment of the hand-over, servers that crash, logs that keep what the
%% dead held.
%%
%% The storms run in a VM of their own, so that a lock-up is a failed test and not a silent one: the
%% stacks of the VM that hangs are printed (with gdb, where there is one) and it is killed.
%% STORM_SEED in the environment repeats a storm's choices.
-module(erllama_cache_semaphore_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/0]).
-export([init_per_testcase/2, end_per_testcase/2]).
-compile(export_all).

-import(erllama_cache_test_util, [
    fresh_dir/2, files/1, open_files/1, meta/1, eventually/1,
    actor/0, actor/1, ask/2, tell/2, answer/2, kill/1, run_command/2
]).

-define(WRITER, erllama_cache_writer).
-define(STORE, semaphore_suite_store).
-define(GUARD, '$erllama_cache_guard').
-define(MIB, (1 bsl 20)).
%% Takes several slices to write.
-define(LARGE, 64 * ?MIB).

-define(STORM_VICTIMS, 10000).
-define(STORM_CROWD, 100).
-define(STORM_LIMIT, 16).
-define(STORM_DEADLINE, 60000).

suite() ->
    [{timetrap, {seconds, 90}}].

all() ->
    [{group, Group} || {Group, _, _} <- groups()].

groups() ->
    [
        {storms, [], [
            kill_storm,
            kill_storm_on_one_core
        ]},
        {wakeups, [], [
            releaser_killed_in_a_write,
            time_out_at_the_hand_over,
            waiter_killed_after_the_hand_over,
            last_lane_waits_for_the_usual_one,
            waiter_in_the_last_lane_looks_up_meanwhile,
            waiter_in_the_last_lane_gives_up,
            waiter_in_the_last_lane_gives_up_after_the_hand_over,
            giving_up_in_the_last_lane_at_the_hand_over,
            light_save_passes_a_large_one_in_the_last_lane,
            limit_raised_under_waiters,
            byte_bound_raised_under_waiters,
            server_restarted_under_waiters,
            server_that_nobody_replaces,
            server_that_is_replaced_in_time,
            server_that_crashes_soon_after_another,
            server_stopped_under_waiters
        ]},
        {ends, [], [
            crash_report_keeps_no_slot,
            guard_kept_elsewhere_keeps_no_slot,
            guard_without_a_process_keeps_no_slot,
            erased_dictionary_keeps_no_slot,
            owner_returns,
            owner_dies_with_a_linked_process,
            suspended_owner_is_killed,
            nested_slots_come_back,
            acquires_again_after_release
        ]},
        {tidiness, [], [
            leaves_no_messages,
            makes_one_dictionary_entry
        ]},
        {bytes, [], [
            inflight_bytes_stay_within_the_bound,
            payload_above_the_bound_runs_alone,
            invalid_bounds_are_refused
        ]},
        {reports, [], [
            info_counts,
            holders_and_waiters_are_listed,
            invalid_weights_are_refused
        ]}
    ].

init_per_testcase(Case, Config) when Case =:= kill_storm; Case =:= kill_storm_on_one_core ->
    Config;
init_per_testcase(server_restarted_under_waiters, Config) ->
    Stores = [{?STORE, #{root => fresh_dir(root, Config)}}],
    _ = application:load(erllama_cache_nif),
    ok = application:set_env(erllama_cache_nif, stores, Stores),
    ok = application:set_env(erllama_cache_nif, max_concurrent, 1),
    {ok, _} = application:ensure_all_started(erllama_cache_nif),
    Config;
init_per_testcase(_Case, Config) ->
    Root = fresh_dir(root, Config),
    ok = start_servers(Root, 1),
    [{root, Root} | Config].

end_per_testcase(Case, _Config) when Case =:= kill_storm; Case =:= kill_storm_on_one_core ->
    ok;
end_per_testcase(server_restarted_under_waiters, _Config) ->
    ok = nobody_stays(),
    ok = application:stop(erllama_cache_nif),
    ok = application:unload(erllama_cache_nif);
end_per_testcase(_Case, Config) ->
    ok = nobody_stays(),
    ok = stop_servers(),
    ok = file:del_dir_r(?config(root, Config)).

start_servers(Root, Limit) ->
    {ok, Store} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    {ok, Writer} = ?WRITER:start_link(#{host => ?MODULE, max_concurrent => Limit}),
    true = unlink(Store),
    true = unlink(Writer),
    ok.

stop_servers() ->
    lists:foreach(fun erllama_cache_test_util:stop/1, [?WRITER, ?STORE]).

%% The semaphore is the same one in all tests: whoever is still there when one of them ends goes,
%% and what nobody who lives holds must have come back.
nobody_stays() ->
    lists:foreach(
        fun
            (#{pid := Pid}) when Pid =:= self() -> ok = ?WRITER:release();
            (#{pid := Pid}) -> ok = kill(Pid)
        end,
        ?WRITER:waiters() ++ ?WRITER:holders()
    ),
    nobody_is_left().

nobody_is_left() ->
    eventually(fun() ->
        #{current := Current, inflight_bytes := Bytes, waiting := Waiting} = ?WRITER:info(),
        {Current, Bytes, Waiting, ?WRITER:holders(), ?WRITER:waiters()} =:= {0, 0, 0, [], []}
    end).

%%% The host: the store, with a door that a test may hold shut while a save has its slot

identify(KeyedBy, #{save_reason_detail := <<"ask ", Keeper/binary>>} = Meta) ->
    Pid = binary_to_term(Keeper),
    Pid ! {inside, self()},
    receive
        {Pid, go_on} -> erllama_cache_store:identify(KeyedBy, Meta)
    end;
identify(KeyedBy, Meta) ->
    erllama_cache_store:identify(KeyedBy, Meta).

reserve(Store, Tier, Key, Size) -> erllama_cache_store:reserve(Store, Tier, Key, Size).
root(Store) -> erllama_cache_store:root(Store).
check(Store, Key, Token) -> erllama_cache_store:check(Store, Key, Token).
cancel(Store, Key, Token) -> erllama_cache_store:cancel(Store, Key, Token).
count(Store, Event) -> erllama_cache_store:count(Store, Event).

mark_published(Store, Key, Token, Path) ->
    erllama_cache_store:mark_published(Store, Key, Token, Path).

announce(Store, Key, Token, Size, Header, Tokens) ->
    erllama_cache_store:announce(Store, Key, Token, Size, Header, Tokens).

%% A save that asks the calling process before it goes on, once it has its slot.
asking(Meta) ->
    Meta#{save_reason_detail => <<"ask ", (term_to_binary(self()))/binary>>}.

%% The next save that has its slot.
inside() ->
    receive
        {inside, Saver} -> Saver
    after 20000 -> error(nobody_came_in)
    end.

nobody_inside() ->
    receive
        {inside, Saver} -> error({came_in, Saver})
    after 0 -> ok
    end.

go_on(Saver) ->
    Saver ! {self(), go_on},
    ok.

%%% Storms

kill_storm(Config) ->
    storm_in_a_vm("erl", [], Config).

%% Four schedulers of each kind on one core: whoever holds a lock is likely to be off the core while
%% the others want it.
kill_storm_on_one_core(Config) ->
    case os:find_executable("taskset") of
        false -> {skip, "needs taskset"};
        TaskSet -> storm_in_a_vm(TaskSet, ["-c", "0", "erl", "+S", "4:4"], Config)
    end.

storm_in_a_vm(Command, Args, Config) ->
    Seed = storm_seed(),
    ct:pal("STORM_SEED=~b", [Seed]),
    {ok, Peer, _} = peer:start(#{
        exec => {os:find_executable(Command), Args},
        args => ["+SDio", "4", "-pa" | code:get_path()],
        connection => standard_io,
        shutdown => halt
    }),
    Pid = peer:call(Peer, os, getpid, []),
    Root = fresh_dir(storm, Config),
    try peer:call(Peer, ?MODULE, storm, [Seed, Root], ?STORM_DEADLINE) of
        Summary ->
            ct:pal("~p", [Summary]),
            ok = file:del_dir_r(Root)
    catch
        exit:{timeout, _} ->
            ct:pal("~ts", [stacks_of(Pid)]),
            error(storm_hangs)
    after
        %% One that hangs does not stop when it is asked to.
        Monitor = monitor(process, Peer),
        _ = run_command("kill", ["-KILL", Pid]),
        receive {'DOWN', Monitor, process, Peer, _} -> ok end
    end.

storm_seed() ->
    case os:getenv("STORM_SEED") of
        false -> rand:uniform(1 bsl 32);
        Seed -> list_to_integer(Seed)
    end.

stacks_of(Pid) ->
    case run_command("gdb", ["-batch", "-ex", "thread apply all bt", "-p", Pid]) of
        not_found -> "no gdb: no stacks of the VM";
        {_, Stacks} -> Stacks
    end.

%% Ten thousand processes that acquire, wait, nest, save and release until they are killed, a
%% hundred at a time, while the bounds change and the server is killed now and then.
storm(Seed, Root) ->
    _ = rand:seed(exsss, Seed),
    ok = logger:set_primary_config(level, none),
    ok = start_servers(Root, ?STORM_LIMIT),
    Before = ?WRITER:info(),
    Tally = counters:new(3, []),
    Large = binary:copy(<<"large">>, 48 * ?MIB div 5),
    _ = [storm_victim(Seed, Tally, Large) || _ <- lists:seq(1, ?STORM_CROWD)],
    ok = storm_on(?STORM_VICTIMS - ?STORM_CROWD, Seed, Tally, Large),
    ok = storm_over(?STORM_CROWD),
    ok = nobody_is_left(),
    ok = ?WRITER:set_max_concurrent(?STORM_LIMIT),
    ok = ?WRITER:set_max_inflight_bytes(infinity),
    Summary = storm_summary(Before, ?WRITER:info(), Tally),
    ok = every_slot_is_free(),
    ok = storm_left_whole_files(Root),
    ok = stop_servers(),
    Summary.

storm_on(0, _Seed, _Tally, _Large) ->
    ok;
storm_on(Left, Seed, Tally, Large) ->
    await_victim(),
    ok = storm_change(rand:uniform(200)),
    storm_victim(Seed + Left, Tally, Large),
    storm_on(Left - 1, Seed, Tally, Large).

storm_over(0) ->
    ok;
storm_over(Left) ->
    await_victim(),
    storm_over(Left - 1).

%% Kills whose time has come until one of them is dead.
await_victim() ->
    receive
        {kill, Pid} -> exit(Pid, kill), await_victim();
        {'DOWN', _, process, _, killed} -> ok
    end.

%% One in twenty writes large payloads and lives long enough to be killed in the middle of one.
storm_victim(Seed, Tally, Large) ->
    {Turn, Age} = case rand:uniform(20) of
        1 -> {fun() -> storm_save(Large, Tally) end, rand:uniform(50)};
        _ -> {fun() -> storm_turn(rand:uniform(10), Tally, Large) end, rand:uniform(5) - 1}
    end,
    {Pid, _} = spawn_monitor(fun() ->
        _ = rand:seed(exsss, Seed),
        storm_turns(Turn)
    end),
    _ = erlang:send_after(Age, self(), {kill, Pid}),
    ok.

storm_turns(Turn) ->
    _ = Turn(),
    storm_turns(Turn).

-define(ACQUIRED, 1).
-define(RELEASES_BEGUN, 2).
-define(RELEASES_DONE, 3).

storm_turn(N, Tally, _Large) when N =< 6 ->
    Timeout = lists:nth(rand:uniform(5), [0, 1, 2, 5, infinity]),
    Weight = lists:nth(rand:uniform(4), [1, 1, 1, 2]),
    case storm_attempt(fun() -> ?WRITER:acquire(Timeout, #{weight => Weight}) end) of
        ok ->
            ok = counters:add(Tally, ?ACQUIRED, 1),
            %% Now and then it is kept, and the next one is nested in it.
            rand:uniform(4) =:= 1 orelse storm_release(Tally);
        _ ->
            ok
    end;
storm_turn(N, Tally, _Large) when N =< 8 ->
    storm_release(Tally);
storm_turn(_N, Tally, Large) ->
    storm_save(binary:part(Large, 0, rand:uniform(8192)), Tally).

storm_release(Tally) ->
    _ = erlang:yield(),
    ok = counters:add(Tally, ?RELEASES_BEGUN, 1),
    ok = ?WRITER:release(),
    ok = counters:add(Tally, ?RELEASES_DONE, 1).

storm_save(Payload, Tally) ->
    Meta = meta([rand:uniform(1 bsl 32)]),
    ok = counters:add(Tally, ?RELEASES_BEGUN, 1),
    storm_attempt(fun() -> ?WRITER:save(?STORE, disk, Meta, Payload, rand:uniform(10)) end).

storm_attempt(Fun) ->
    try
        Fun()
    catch
        exit:{noproc, _} -> noproc
    end.

storm_change(1) ->
    exit(whereis(?WRITER), kill),
    restart_writer();
storm_change(N) when N < 8 ->
    ?WRITER:set_max_concurrent(1 + rand:uniform(2 * ?STORM_LIMIT));
storm_change(N) when N < 12 ->
    ?WRITER:set_max_inflight_bytes(lists:nth(rand:uniform(3), [0, 100000, infinity]));
storm_change(_) ->
    ok.

restart_writer() ->
    case ?WRITER:start_link(#{host => ?MODULE, max_concurrent => ?STORM_LIMIT}) of
        {ok, Pid} ->
            true = unlink(Pid),
            ok;
        {error, {already_started, _}} ->
            restart_writer()
    end.

%% What was granted has been released or has come back from the dead. The victims counted before and
%% after what they did, and were killed in between.
storm_summary(Before, After, Tally) ->
    [Granted, Died] = [map_get(K, After) - map_get(K, Before) || K <- [granted, owner_died]],
    [Acquired, Begun, Done] =
        [counters:get(Tally, I) || I <- [?ACQUIRED, ?RELEASES_BEGUN, ?RELEASES_DONE]],
    ?assert(Granted >= Acquired),
    ?assert(Granted - Died =< Begun),
    #{granted => Granted, owner_died => Died, acquired => Acquired, releases_begun => Begun,
      releases_done => Done, info => After}.

every_slot_is_free() ->
    Limit = ?WRITER:max_concurrent(),
    ok = ?WRITER:acquire(0, #{weight => Limit}),
    {error, max_concurrent} = ask(actor(), fun() -> ?WRITER:acquire(0) end),
    ok = ?WRITER:release(),
    Holders = [actor() || _ <- lists:seq(1, Limit)],
    lists:foreach(fun(Holder) -> ok = ask(Holder, fun() -> ?WRITER:acquire(0) end) end, Holders),
    Limit = ?WRITER:current(),
    lists:foreach(fun(Holder) -> ok = kill(Holder) end, Holders),
    nobody_is_left().

%% No temporary file has a name or is open, and what has been published can be loaded.
storm_left_whole_files(Root) ->
    eventually(fun() -> maps:get(reservations, erllama_cache_store:info(?STORE)) =:= 0 end),
    eventually(fun() -> open_files(Root) =:= [] end),
    Files = files(Root),
    ?assertEqual([], [File || File <- Files, filename:extension(File) =/= ".kvc"]),
    lists:foreach(
        fun(File) ->
            Key = binary:decode_hex(list_to_binary(filename:rootname(File))),
            {ok, _, _} = erllama_cache_store:load(?STORE, Key)
        end,
        Files
    ).

%%% Waiters are woken

%% What a process that was killed in a dirty NIF holds comes back when that NIF ends, and then it
%% can send no message in its own name any more.
releaser_killed_in_a_write(_Config) ->
    Payload = binary:copy(<<7>>, ?LARGE),
    Kept = [kill_writer(N, Payload) || N <- lists:seq(1, 20)],
    %% The slot bounds running I/O: it was not free before the write had ended. Where time has
    %% another pace, as under valgrind, most kills come between two slices.
    ?assert(lists:member(true, Kept) orelse lists:any(
        fun(N) -> kill_writer(N, Payload) end, lists:seq(21, 500)
    )).

%% Whether the writer has been seen to hold its slot when it was dead.
kill_writer(N, Payload) ->
    Writer = spawn(fun() -> ?WRITER:save(?STORE, disk, meta([N]), Payload) end),
    eventually(fun() -> writes(Writer) orelse not is_process_alive(Writer) end),
    Waiter = actor(),
    Acquire = tell(Waiter, fun() -> ?WRITER:acquire(infinity) end),
    eventually(fun() -> ?WRITER:waiters() =/= [] orelse not is_process_alive(Writer) end),
    ok = kill(Writer),
    Kept = lists:member(Writer, [Pid || #{pid := Pid} <- ?WRITER:holders()]),
    ok = answer(Waiter, Acquire),
    [#{pid := Waiter}] = ?WRITER:holders(),
    ok = kill(Waiter),
    nobody_is_left(),
    Kept.

writes(Pid) ->
    case process_info(Pid, current_function) of
        {current_function, {erllama_cache_nif, Function, _}} ->
            lists:member(Function, [write_tmp, write_more]);
        _ ->
            false
    end.

await_waiters(N) ->
    eventually(fun() -> length(?WRITER:waiters()) =:= N end).

%% Each time either the waiter has the slot or the one behind it has, and nobody is left a message.
time_out_at_the_hand_over(_Config) ->
    time_out_at_the_hand_over_of(fun(Timeout) -> ?WRITER:acquire(Timeout) end).

time_out_at_the_hand_over_of(Acquire) ->
    Holder = actor([{priority, high}]),
    Waiter = actor([{priority, high}]),
    Next = actor(),
    Won = [hand_over_at(Jitter, Holder, Waiter, Next, Acquire)
           || _ <- lists:seq(1, 60), Jitter <- lists:seq(-400, 400, 80)],
    ct:pal("~b of ~b waiters had the slot", [length([ok || ok <- Won]), length(Won)]),
    lists:foreach(fun has_no_message/1, [Holder, Waiter, Next]).

hand_over_at(Jitter, Holder, Waiter, Next, Acquire) ->
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    TimeOut = erlang:monotonic_time(microsecond) + 1000,
    Wait = tell(Waiter, fun() -> Acquire(1) end),
    Release = tell(Holder, fun() ->
        spin_until(TimeOut + Jitter),
        ?WRITER:release()
    end),
    Behind = tell(Next, fun() -> Acquire(infinity) end),
    ok = answer(Holder, Release),
    Result = answer(Waiter, Wait),
    _ = case Result of
        ok -> ok = ask(Waiter, fun() -> ?WRITER:release() end);
        {error, max_concurrent} -> ok
    end,
    ok = answer(Next, Behind),
    [#{pid := Next}] = ?WRITER:holders(),
    ok = ask(Next, fun() -> ?WRITER:release() end),
    0 = ?WRITER:current(),
    Result.

spin_until(Time) ->
    case erlang:monotonic_time(microsecond) >= Time of
        true -> ok;
        false -> spin_until(Time)
    end.

has_no_message(Pid) ->
    ?assertEqual({messages, []}, process_info(Pid, messages)).

%% It has been given the slot but has not run since: it dies with the message in its mailbox.
waiter_killed_after_the_hand_over(_Config) ->
    Holder = actor(),
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    [First, Second] = queue_up(2),
    true = erlang:suspend_process(pid_of(First)),
    ok = ask(Holder, fun() -> ?WRITER:release() end),
    [First1] = ?WRITER:holders(),
    ?assertEqual(pid_of(First), maps:get(pid, First1)),
    ok = kill(pid_of(First)),
    ok = answered(Second).

%% Actors that wait for a slot, the next to be served first.
queue_up(N) ->
    Before = length(?WRITER:waiters()),
    [queue_up_behind(Before + I - 1) || I <- lists:seq(1, N)].

queue_up_behind(Before) ->
    queue_up_behind(Before, fun() -> ?WRITER:acquire(infinity) end).

queue_up_behind(Before, Asks) ->
    Waiter = actor(),
    Acquire = tell(Waiter, Asks),
    await_waiters(Before + 1),
    {Waiter, Acquire}.

pid_of({Waiter, _Acquire}) -> Waiter.

answered({Waiter, Acquire}) -> answer(Waiter, Acquire).

waiting(Waiters) ->
    [pid_of(Waiter) || Waiter <- Waiters] =:= [Pid || #{pid := Pid} <- ?WRITER:waiters()].

%%% The last lane

%% Waits in the last lane for so many bytes, as a save behind its caller does.
wait_last(Bytes, Every, Meanwhile) ->
    %% Makes the process's guard.
    {error, weight_exceeds_limit} = ?WRITER:acquire(0, #{weight => 16#7fffffff}),
    erllama_cache_waiter:wait_last(get(?GUARD), 1, Bytes, Every, Meanwhile).

wait_last() ->
    wait_last(0, infinity, fun() -> error(too_early) end).

last_lane_waits_for_the_usual_one(_Config) ->
    ok = ?WRITER:acquire(0),
    [First, Second, Third] = Last = [queue_up_behind(N, fun wait_last/0) || N <- [0, 1, 2]],
    [Usual, Dying] = [queue_up_behind(N) || N <- [3, 4]],
    ?assert(waiting([Usual, Dying | Last])),
    ?assertMatch(#{waiting := 5}, ?WRITER:info()),
    ok = ?WRITER:release(),
    ok = answered(Usual),
    ?assert(waiting([Dying | Last])),
    %% Waiters of both lanes that die, and a holder: the next one has the slot.
    lists:foreach(fun(Waiter) -> ok = kill(pid_of(Waiter)) end, [Dying, First, Usual]),
    granted = answered(Second),
    Late = queue_up_behind(1),
    ok = ask(pid_of(Second), fun() -> ?WRITER:release() end),
    ok = answered(Late),
    ?assert(waiting([Third])),
    ok = gen_server:stop(?WRITER),
    closed = answered(Third),
    lists:foreach(fun has_no_message/1, [pid_of(Waiter) || Waiter <- [Second, Third, Late]]).

waiter_in_the_last_lane_looks_up_meanwhile(_Config) ->
    ok = ?WRITER:acquire(0),
    Test = self(),
    Tell = fun() -> Test ! meanwhile, ok end,
    Waiter = queue_up_behind(0, fun() -> wait_last(0, 1, Tell) end),
    lists:foreach(
        fun(_) -> receive meanwhile -> ok after 20000 -> error(never_again) end end,
        lists:seq(1, 10)
    ),
    ?assert(waiting([Waiter])),
    ok = ?WRITER:release(),
    granted = answered(Waiter),
    has_no_message(pid_of(Waiter)).

waiter_in_the_last_lane_gives_up(_Config) ->
    ok = ?WRITER:acquire(0),
    #{timed_out := Before} = ?WRITER:info(),
    Waiter = actor(),
    Raise = fun(Class) -> wait_last(0, 1, fun() -> erlang:Class(expired) end) end,
    {gave_up, {error, expired}} =
        ask(Waiter, fun() -> wait_last(0, 1, fun() -> {error, expired} end) end),
    [{Class, expired} = ask(Waiter, fun() -> try Raise(Class) catch C:R -> {C, R} end end)
     || Class <- [error, exit, throw]],
    ?assertEqual({[], Before + 4}, {?WRITER:waiters(), maps:get(timed_out, ?WRITER:info())}),
    ok = ?WRITER:release(),
    ?assertEqual(0, ?WRITER:current()),
    has_no_message(Waiter).

%% The slot comes while it looks up, and it does not want it any more.
waiter_in_the_last_lane_gives_up_after_the_hand_over(_Config) ->
    [Holder, Waiter] = [actor(), actor()],
    Before = maps:get(timed_out, ?WRITER:info()),
    lists:foreach(
        fun(End) ->
            ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
            Meanwhile = fun() ->
                ok = ask(Holder, fun() -> ?WRITER:release() end),
                [#{pid := Waiter}] = ?WRITER:holders(),
                End()
            end,
            expired = ask(Waiter, fun() ->
                try wait_last(0, 1, Meanwhile) of
                    {gave_up, Error} -> Error
                catch
                    throw:Thrown -> Thrown
                end
            end),
            ?assertEqual({0, []}, {?WRITER:current(), ?WRITER:holders()})
        end,
        [fun() -> expired end, fun() -> throw(expired) end]
    ),
    ?assertEqual(Before, maps:get(timed_out, ?WRITER:info())),
    has_no_message(Waiter).

giving_up_in_the_last_lane_at_the_hand_over(_Config) ->
    time_out_at_the_hand_over_of(fun(Timeout) ->
        case wait_last(0, Timeout, fun() -> {error, max_concurrent} end) of
            granted -> ok;
            {gave_up, Error} -> Error
        end
    end).

%% Its bytes do not fit beside what is in memory, and nothing is given back until others are done.
light_save_passes_a_large_one_in_the_last_lane(_Config) ->
    ok = ?WRITER:set_max_concurrent(4),
    ok = ?WRITER:set_max_inflight_bytes(1000),
    Small = saver(1, <<0:500/unit:8>>),
    SmallInside = inside(),
    Large = queue_up_behind(0, fun() ->
        wait_last(5000, infinity, fun() -> error(too_early) end)
    end),
    {ok, _} = ?WRITER:save(?STORE, disk, meta([2]), <<0:500/unit:8>>, infinity),
    {ok, _} = ?WRITER:save(?STORE, disk, meta([3]), <<0:500/unit:8>>, 0),
    ok = ?WRITER:acquire(0),
    ok = ?WRITER:acquire(infinity, #{weight => 2}),
    ok = ?WRITER:release(),
    ok = ?WRITER:release(),
    ?assert(waiting([Large])),
    ok = go_on(SmallInside),
    {ok, _} = answered(Small),
    granted = answered(Large),
    ?assertEqual(5000, inflight_bytes()).

limit_raised_under_waiters(_Config) ->
    ok = ?WRITER:acquire(0),
    [First, Second, Third | Rest] = queue_up(5),
    ok = ?WRITER:set_max_concurrent(4),
    ?assert(waiting(Rest)),
    [ok, ok, ok] = [answered(Waiter) || Waiter <- [First, Second, Third]],
    %% A lower limit takes nothing from anybody, but gives nothing either until enough is back.
    ok = ?WRITER:set_max_concurrent(2),
    ok = kill(pid_of(First)),
    ok = kill(pid_of(Second)),
    eventually(fun() -> ?WRITER:current() =:= 2 end),
    ?assert(waiting(Rest)),
    ok = ?WRITER:set_max_concurrent(4),
    [ok, ok] = [answered(Waiter) || Waiter <- Rest],
    ok = ?WRITER:release().

byte_bound_raised_under_waiters(_Config) ->
    ok = ?WRITER:set_max_concurrent(3),
    ok = ?WRITER:set_max_inflight_bytes(100),
    [First, Second] = [saver(N, <<0:100/unit:8>>) || N <- [1, 2]],
    Inside = inside(),
    await_waiters(1),
    nobody_inside(),
    ok = ?WRITER:set_max_inflight_bytes(200),
    ok = go_on(inside()),
    ok = go_on(Inside),
    [{ok, _}, {ok, _}] = [answered(Saver) || Saver <- [First, Second]].

%% The supervisor starts another server; those who wait do not notice, nor do those who hold.
server_restarted_under_waiters(_Config) ->
    ok = ?WRITER:acquire(0),
    [First, Second, Third] = Waiters = queue_up(3),
    Server = whereis(?WRITER),
    ok = kill(Server),
    eventually(fun() -> not lists:member(whereis(?WRITER), [undefined, Server]) end),
    eventually(fun() -> opened() end),
    ?assert(waiting(Waiters)),
    ?assertEqual(1, ?WRITER:current()),
    ok = ?WRITER:release(),
    ok = answered(First),
    ok = kill(pid_of(First)),
    ok = answered(Second),
    %% Slots come back while there is no server at all, too.
    ok = supervisor:terminate_child(erllama_cache_nif_sup, ?WRITER),
    {noproc, _} = ended(Third),
    ok = kill(pid_of(Second)),
    nobody_is_left(),
    {ok, _} = supervisor:restart_child(erllama_cache_nif_sup, ?WRITER),
    ok = ?WRITER:acquire(0),
    ok = ?WRITER:release().

%% Without taking anything: nobody may have a slot of this weight here.
opened() ->
    try ?WRITER:acquire(0, #{weight => 16#7fffffff}) of
        {error, weight_exceeds_limit} -> true
    catch
        exit:{noproc, _} -> false
    end.

%% Why a waiter's call has exited.
ended({Waiter, Acquire}) ->
    try answer(Waiter, Acquire) of
        Result -> error({no_exit, Result})
    catch
        exit:Reason -> Reason
    end.

%% As when a supervisor has given up: a minute later.
server_that_nobody_replaces(_Config) ->
    ok = ?WRITER:acquire(0),
    Waiters = queue_up(3),
    Abandons = kill_server(),
    ?assert(waiting(Waiters)),
    a_minute_has_passed(Abandons),
    [{noproc, {?WRITER, acquire, [infinity]}} = ended(Waiter) || Waiter <- Waiters],
    lists:foreach(fun has_no_message/1, [pid_of(Waiter) || Waiter <- Waiters]),
    ok = ?WRITER:release().

server_that_is_replaced_in_time(_Config) ->
    ok = ?WRITER:acquire(0),
    [First | _] = Waiters = queue_up(3),
    Abandons = kill_server(),
    {ok, Server} = ?WRITER:start_link(#{host => ?MODULE, max_concurrent => 1}),
    true = unlink(Server),
    a_minute_has_passed(Abandons),
    ?assert(waiting(Waiters)),
    ok = ?WRITER:release(),
    ok = answered(First).

%% The minute of the first is over before that of the second.
server_that_crashes_soon_after_another(_Config) ->
    ok = ?WRITER:acquire(0),
    Waiters = queue_up(3),
    OfFirst = kill_server(),
    {ok, Second} = ?WRITER:start_link(#{host => ?MODULE, max_concurrent => 1}),
    true = unlink(Second),
    OfSecond = kill_server(),
    a_minute_has_passed(OfFirst),
    ?assert(waiting(Waiters)),
    a_minute_has_passed(OfSecond),
    [{noproc, {?WRITER, acquire, [infinity]}} = ended(Waiter) || Waiter <- Waiters],
    ok = ?WRITER:release().

%% The server, and who is to tell the waiters when it is gone.
kill_server() ->
    Server = whereis(?WRITER),
    {monitored_by, Monitors} = process_info(Server, monitored_by),
    [Abandons] = [Pid || Pid <- Monitors, is_pid(Pid)],
    ok = kill(Server),
    Abandons.

a_minute_has_passed(Abandons) ->
    Monitor = monitor(process, Abandons),
    Abandons ! {timeout, make_ref(), no_server},
    receive {'DOWN', Monitor, process, Abandons, normal} -> ok end.

server_stopped_under_waiters(_Config) ->
    ok = ?WRITER:acquire(0),
    Waiters = queue_up(3),
    ok = gen_server:stop(?WRITER),
    lists:foreach(
        fun(Waiter) -> {noproc, {?WRITER, acquire, [infinity]}} = ended(Waiter) end,
        Waiters
    ),
    lists:foreach(fun has_no_message/1, [pid_of(Waiter) || Waiter <- Waiters]),
    ok = ?WRITER:release().

%%% However an owner ends

%% The report of a crash copies the dictionary of who crashed, and with it the guard, to every
%% handler of the logger. One that keeps it keeps no slot.
crash_report_keeps_no_slot(_Config) ->
    Kept = ets:new(kept, [public]),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{table => Kept}}),
    try
        Crashing = proc_lib:spawn(fun() ->
            ok = ?WRITER:acquire(0),
            ok = ?WRITER:acquire(infinity, #{weight => 1}),
            error(on_purpose)
        end),
        %% The second acquire waits for the limit: so there are two to come back.
        await_waiters(1),
        ok = ?WRITER:set_max_concurrent(2),
        eventually(fun() -> ets:member(Kept, Crashing) end),
        nobody_is_left(),
        [{Crashing, Report}] = ets:lookup(Kept, Crashing),
        ?assertMatch({?GUARD, Guard} when is_reference(Guard), dictionary_entry(Report))
    after
        ok = logger:remove_handler(?MODULE)
    end.

%% A handler of the logger: keeps crash reports.
log(#{msg := {report, #{label := {proc_lib, crash}, report := [Info | _]}}},
    #{config := #{table := Kept}}) ->
    true = ets:insert(Kept, {proplists:get_value(pid, Info), Info});
log(_Event, _Handler) ->
    ok.

dictionary_entry(Report) ->
    lists:keyfind(?GUARD, 1, proplists:get_value(dictionary, Report)).

guard_kept_elsewhere_keeps_no_slot(_Config) ->
    Owner = actor(),
    Guard = ask(Owner, fun() ->
        ok = ?WRITER:acquire(0),
        get(?GUARD)
    end),
    Waiter = queue_up_behind(0),
    ok = kill(Owner),
    ok = answered(Waiter),
    %% The guard of a dead owner is good for nothing any more.
    ?assertEqual(none, erllama_cache_nif:release(Guard)),
    ?assertEqual(ended, erllama_cache_nif:try_acquire(Guard, 1, 0)),
    ?assertEqual(1, ?WRITER:current()).

%% The garbage collector finds that nobody can release it.
guard_without_a_process_keeps_no_slot(_Config) ->
    #{owner_died := Died} = ?WRITER:info(),
    Owner = actor(),
    ok = ask(Owner, fun() -> ?WRITER:acquire(0) end),
    Waiter = queue_up_behind(0),
    ok = ask(Owner, fun() ->
        _ = erase(?GUARD),
        true = garbage_collect(),
        ok
    end),
    ok = answered(Waiter),
    ?assertMatch(#{owner_died := Died}, ?WRITER:info()),
    {error, max_concurrent} = ask(Owner, fun() -> ?WRITER:acquire(0) end),
    ok = kill(pid_of(Waiter)),
    ok = ask(Owner, fun() -> ?WRITER:acquire(infinity) end).

%% Who runs with a slot, and who saves, may erase the dictionary that the guard is in.
erased_dictionary_keeps_no_slot(_Config) ->
    Owner = actor(),
    Erase = fun() ->
        _ = erase(),
        erased
    end,
    {ok, erased} = ask(Owner, fun() -> ?WRITER:with_slot(0, Erase) end),
    ?assertEqual(0, ?WRITER:current()),
    %% A guard of its own for what is acquired after that, and both come back.
    {ok, erased} = ask(Owner, fun() ->
        ?WRITER:with_slot(0, fun() ->
            erased = Erase(),
            {error, max_concurrent} = ?WRITER:acquire(0),
            erased
        end)
    end),
    ?assertEqual(0, ?WRITER:current()).

owner_returns(_Config) ->
    {Owner, Monitor} = spawn_monitor(fun() -> ok = ?WRITER:acquire(0) end),
    receive
        {'DOWN', Monitor, process, Owner, normal} -> nobody_is_left()
    end.

owner_dies_with_a_linked_process(_Config) ->
    Owner = actor(),
    ok = ask(Owner, fun() -> ?WRITER:acquire(0) end),
    Waiter = queue_up_behind(0),
    Other = ask(Owner, fun() -> spawn_link(fun() -> exit(on_purpose) end) end),
    ?assert(is_pid(Other)),
    ok = answered(Waiter),
    ?assertNot(is_process_alive(Owner)).

suspended_owner_is_killed(_Config) ->
    Owner = actor(),
    ok = ask(Owner, fun() -> ?WRITER:acquire(0) end),
    Waiter = queue_up_behind(0),
    true = erlang:suspend_process(Owner),
    true = erlang:suspend_process(pid_of(Waiter)),
    ok = kill(Owner),
    eventually(fun() -> [pid_of(Waiter)] =:= [Pid || #{pid := Pid} <- ?WRITER:holders()] end),
    true = erlang:resume_process(pid_of(Waiter)),
    ok = answered(Waiter).

nested_slots_come_back(_Config) ->
    ok = ?WRITER:set_max_concurrent(6),
    Owner = actor(),
    {ok, done} = ask(Owner, fun() ->
        ok = ?WRITER:acquire(0, #{weight => 3}),
        ?WRITER:with_slot(0, fun() ->
            ok = ?WRITER:acquire(0, #{weight => 2}),
            6 = ?WRITER:current(),
            {error, max_concurrent} = ?WRITER:acquire(0),
            ok = ?WRITER:release(),
            4 = ?WRITER:current(),
            done
        end)
    end),
    3 = ?WRITER:current(),
    {caught, 3} = ask(Owner, fun() ->
        try
            ?WRITER:with_slot(0, fun() -> throw({caught, ?WRITER:current() - 1}) end)
        catch
            throw:Thrown -> Thrown
        end
    end),
    3 = ?WRITER:current(),
    ok = kill(Owner),
    nobody_is_left().

acquires_again_after_release(_Config) ->
    First = actor(),
    Second = actor(),
    lists:foreach(
        fun(_) ->
            ok = ask(First, fun() -> ?WRITER:acquire(0) end),
            Wait = tell(Second, fun() -> ?WRITER:acquire(infinity) end),
            await_waiters(1),
            ok = ask(First, fun() -> ?WRITER:release() end),
            ok = answer(Second, Wait),
            %% One release too many gives back nothing of somebody else's.
            ok = ask(First, fun() -> ?WRITER:release() end),
            {error, max_concurrent} = ask(First, fun() -> ?WRITER:acquire(0) end),
            ok = ask(Second, fun() -> ?WRITER:release() end)
        end,
        lists:seq(1, 20)
    ),
    nobody_is_left().

%%% Tidiness

leaves_no_messages(_Config) ->
    Crowd = [actor() || _ <- lists:seq(1, 8)],
    Turn = fun(N) ->
        case ?WRITER:acquire(N rem 3) of
            ok -> ?WRITER:release();
            {error, max_concurrent} -> ok
        end
    end,
    Turns = [{Pid, tell(Pid, fun() -> lists:foreach(Turn, lists:seq(1, 1000)) end)}
             || Pid <- Crowd],
    lists:foreach(fun({Pid, Ref}) -> ok = answer(Pid, Ref) end, Turns),
    lists:foreach(fun has_no_message/1, Crowd).

makes_one_dictionary_entry(_Config) ->
    %% An actor of spawn_opt/2 begins with an empty dictionary.
    Actor = actor(),
    ok = ask(Actor, fun() ->
        lists:foreach(
            fun(_) ->
                ok = ?WRITER:acquire(infinity),
                ok = ?WRITER:release(),
                {ok, done} = ?WRITER:with_slot(0, fun() -> done end)
            end,
            lists:seq(1, 1000)
        )
    end),
    ?assertMatch({dictionary, [{?GUARD, _}]}, process_info(Actor, dictionary)),
    %% I/O has a second one, for its turns.
    [
        {ok, _} = ask(Actor, fun() -> ?WRITER:save(?STORE, disk, meta([N]), <<"payload">>) end)
     || N <- [1, 2, 3]
    ],
    {dictionary, Entries} = process_info(Actor, dictionary),
    ?assertEqual(2, length(Entries)).

%%% Bytes

%% A save of such a payload that asks before it goes on.
saver(N, Payload) ->
    Meta = asking(meta([N])),
    Saver = actor(),
    {Saver, tell(Saver, fun() -> ?WRITER:save(?STORE, disk, Meta, Payload, infinity) end)}.

inflight_bytes() ->
    maps:get(inflight_bytes, ?WRITER:info()).

%% Ten saves, two at a time.
inflight_bytes_stay_within_the_bound(_Config) ->
    Size = 100000,
    ok = ?WRITER:set_max_concurrent(10),
    ok = ?WRITER:set_max_inflight_bytes(2 * Size),
    Savers = [saver(N, <<0:Size/unit:8>>) || N <- lists:seq(1, 10)],
    await_waiters(8),
    ok = let_through(inside(), 9, 2 * Size),
    lists:foreach(fun(Saver) -> {ok, _} = answered(Saver) end, Savers),
    0 = inflight_bytes().

let_through(Inside, 0, Bound) ->
    ?assertEqual(Bound div 2, inflight_bytes()),
    go_on(Inside);
let_through(First, Left, Bound) ->
    Second = inside(),
    nobody_inside(),
    ?assertEqual(Bound, inflight_bytes()),
    ok = go_on(First),
    case Left of
        1 -> eventually(fun() -> inflight_bytes() =:= Bound div 2 end);
        _ -> ok
    end,
    let_through(Second, Left - 1, Bound).

%% Alone, but it runs; and whoever came later waits for it, however small.
payload_above_the_bound_runs_alone(_Config) ->
    ok = ?WRITER:set_max_concurrent(10),
    ok = ?WRITER:set_max_inflight_bytes(1000),
    Small = saver(1, <<0:500/unit:8>>),
    SmallInside = inside(),
    Large = saver(2, <<0:5000/unit:8>>),
    await_waiters(1),
    Late = saver(3, <<0:100/unit:8>>),
    await_waiters(2),
    500 = inflight_bytes(),
    ok = go_on(SmallInside),
    LargeInside = inside(),
    ?assertEqual(pid_of(Large), LargeInside),
    {ok, _} = answered(Small),
    5000 = inflight_bytes(),
    ?assert(waiting([Late])),
    ok = go_on(LargeInside),
    ok = go_on(inside()),
    [{ok, _}, {ok, _}] = [answered(Saver) || Saver <- [Large, Late]].

invalid_bounds_are_refused(_Config) ->
    [?assertError(function_clause, ?WRITER:set_max_inflight_bytes(Bytes))
     || Bytes <- [-1, 1.0, 1 bsl 64, none, <<"1">>]],
    [?assertError(function_clause, ?WRITER:set_max_concurrent(Limit))
     || Limit <- [0, -1, 1.0, 1 bsl 31, infinity]],
    ?assertMatch(#{limit := 1, max_inflight_bytes := infinity}, ?WRITER:info()).

%%% Reports

info_counts(_Config) ->
    Before = ?WRITER:info(),
    ?assertMatch(
        #{limit := 1, current := 0, waiting := 0, inflight_bytes := 0,
          max_inflight_bytes := infinity},
        Before
    ),
    [Holder, Impatient] = [actor(), actor()],
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    {error, max_concurrent} = ask(Impatient, fun() -> ?WRITER:acquire(0) end),
    {error, max_concurrent} = ask(Impatient, fun() -> ?WRITER:acquire(1) end),
    [First, Second, Third] = queue_up(3),
    ?assertMatch(#{current := 1, waiting := 3}, ?WRITER:info()),
    ok = kill(pid_of(Second)),
    await_waiters(2),
    ok = ask(Holder, fun() -> ?WRITER:release() end),
    ok = answered(First),
    ok = kill(pid_of(First)),
    ok = answered(Third),
    After = ?WRITER:info(),
    ?assertMatch(#{limit := 1, current := 1, waiting := 0}, After),
    Counts = [granted, timed_out, owner_died, waited],
    ?assertEqual([3, 1, 1, 2], [map_get(K, After) - map_get(K, Before) || K <- Counts]),
    #{longest_wait_us := Longest, mean_wait_us := Mean} = After,
    ?assert(Mean > 0 andalso Mean =< Longest),
    ?assertEqual(lists:sort(maps:keys(Before)), lists:sort(maps:keys(After))).

holders_and_waiters_are_listed(_Config) ->
    ok = ?WRITER:set_max_concurrent(4),
    Holder = actor(),
    ok = ask(Holder, fun() -> ?WRITER:acquire(0, #{weight => 2}) end),
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    Saver = saver(1, <<0:123/unit:8>>),
    Inside = inside(),
    Heavy = actor(),
    Wait = tell(Heavy, fun() -> ?WRITER:acquire(infinity, #{weight => 4}) end),
    await_waiters(1),
    Light = queue_up_behind(1),
    SaverPid = pid_of(Saver),
    LightPid = pid_of(Light),
    ?assertMatch(
        [#{pid := Holder, weight := 2, bytes := 0}, #{pid := Holder, weight := 1, bytes := 0},
         #{pid := SaverPid, weight := 1, bytes := 123}],
        ?WRITER:holders()
    ),
    ?assertMatch(
        [#{pid := Heavy, weight := 4, bytes := 0}, #{pid := LightPid, weight := 1, bytes := 0}],
        ?WRITER:waiters()
    ),
    %% Both kinds of rows tell for how long, and time goes by.
    Rows = fun() -> ?WRITER:holders() ++ ?WRITER:waiters() end,
    eventually(fun() -> lists:all(fun(#{ms := Ms}) -> Ms >= 20 end, Rows()) end),
    lists:foreach(fun(#{ms := Ms}) -> ?assert(Ms < 60000) end, Rows()),
    ok = kill(Holder),
    ok = go_on(Inside),
    {ok, _} = answered(Saver),
    ok = answer(Heavy, Wait),
    ok = kill(Heavy),
    ok = answered(Light).

invalid_weights_are_refused(_Config) ->
    [?assertError(badarg, ?WRITER:acquire(0, #{weight => Weight}))
     || Weight <- [0, -1, 1.0, 1 bsl 31, one, infinity]],
    ?assertEqual({error, weight_exceeds_limit}, ?WRITER:acquire(infinity, #{weight => 2})),
    ?assertEqual(0, ?WRITER:current()),
    ok = ?WRITER:acquire(0, #{}),
    ok = ?WRITER:release().
