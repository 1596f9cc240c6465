%% The semaphore beside a plain Erlang one and the floors, in one VM and one run: `make
%% bench-semaphore'. Every comparison alternates its sides round by round; the figures are medians
%% of the rounds, or percentiles of all samples where a distribution is meant.
-module(bench_semaphore).

-export([main/0]).

-define(ROUNDS, 7).

main() ->
    bench_report:main(semaphore, fun run/0).

run() ->
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store, max_concurrent => 64}),
    {ok, _} = plain_semaphore:start_link(64),
    Parts = [
        fun uncontended/0, fun ten_million/0, fun eight_processes/0, fun wake_up/0,
        fun stampede/0, fun queue_of_sixteen/0, fun killed_owner/0, fun ten_thousand_timeouts/0
    ],
    {Values, Figures} = lists:unzip([Part() || Part <- Parts]),
    {lists:append(Values), lists:foldl(fun maps:merge/2, #{}, Figures)}.

limit(Limit) ->
    ok = erllama_cache_writer:set_max_concurrent(Limit),
    true = ets:insert(plain_semaphore, {max, Limit}).

%%% Free slots

uncontended() ->
    limit(64),
    Floor = fun() -> nothing_pairs(200000) end,
    Ours = fun() -> pairs(200000) end,
    Plain = fun() -> plain_pairs(20000) end,
    Rounds = rounds([{Floor, 200000}, {Ours, 200000}, {Plain, 20000}]),
    [FloorNs, OursNs, PlainNs] = medians(Rounds),
    say("free slots, one process, per pair", [
        {"two bare NIF calls", FloorNs}, {"this", OursNs}, {"plain Erlang", PlainNs}
    ]),
    {
        [{pair, ratio(2, 1, Rounds)}, {pair_plain, ratio(3, 2, Rounds)}],
        #{pair_ns => OursNs, pair_floor_ns => FloorNs, pair_plain_ns => PlainNs}
    }.

nothing_pairs(0) -> ok;
nothing_pairs(N) ->
    _ = bench_nif:nothing(self, 1, 0),
    _ = bench_nif:nothing(self, 1, 0),
    nothing_pairs(N - 1).

pairs(0) -> ok;
pairs(N) ->
    ok = erllama_cache_writer:acquire(infinity),
    ok = erllama_cache_writer:release(),
    pairs(N - 1).

plain_pairs(0) -> ok;
plain_pairs(N) ->
    ok = plain_semaphore:acquire(infinity),
    ok = plain_semaphore:release(),
    plain_pairs(N - 1).

%% One process, ten million pairs, no receive: what a monitor for each acquire could not stand.
ten_million() ->
    limit(64),
    Self = self(),
    {Pid, Monitor} = spawn_monitor(fun() ->
        pairs(100000),
        Before = [nanoseconds(fun() -> pairs(200000) end) / 200000 || _ <- lists:seq(1, ?ROUNDS)],
        MemoryBefore = memory(),
        pairs(bench_report:large(10000000)),
        Grown = memory() - MemoryBefore,
        After = [nanoseconds(fun() -> pairs(200000) end) / 200000 || _ <- lists:seq(1, ?ROUNDS)],
        Self ! {self(), bench_report:median(Before), bench_report:median(After), Grown}
    end),
    receive
        {Pid, Before, After, Grown} ->
            true = demonitor(Monitor, [flush]),
            say("after ten million pairs without a receive, per pair", [
                {"before", Before}, {"after", After}
            ]),
            {
                [{ten_million, After / Before}, {ten_million_memory, Grown / 1024}],
                #{pair_before_ns => Before, pair_after_ten_million_ns => After,
                  ten_million_grown_bytes => Grown}
            }
    end.

memory() ->
    true = garbage_collect(),
    {memory, Own} = process_info(self(), memory),
    Own + erlang:memory(system).

eight_processes() ->
    limit(64),
    Per = 100000,
    One = fun() -> pairs(8 * Per) end,
    Eight = fun() -> together([fun() -> pairs(Per) end || _ <- lists:seq(1, 8)]) end,
    PlainEight = fun() ->
        together([fun() -> plain_pairs(Per div 10) end || _ <- lists:seq(1, 8)])
    end,
    Rounds = rounds([{One, 8 * Per}, {Eight, 8 * Per}, {PlainEight, 8 * Per div 10}]),
    [OneNs, EightNs, PlainNs] = medians(Rounds),
    say("free slots, 8 processes, per pair", [
        {"this, one process", OneNs}, {"this, eight", EightNs}, {"plain Erlang, eight", PlainNs}
    ]),
    {
        [{eight, ratio(2, 1, Rounds)}],
        #{pair_eight_ns => EightNs, pair_eight_plain_ns => PlainNs}
    }.

%%% Waiting

%% From just before the release to the waiter running, against a message to a process that sleeps
%% in receive. Three times:
%% - the VM asleep for a millisecond before each sample, as it is when somebody waits for a save to
%%   end, and the releaser going on with its work, as a caller of save/4 does: another scheduler
%%   has to be woken;
%% - the same, but the releaser at rest, so that its own scheduler runs the waiter: this shows what
%%   the code costs when nothing of it is in the processor's caches;
%% - the VM awake all the time: what it costs when all of it is.
wake_up() ->
    limit(1),
    Ours = {fun erllama_cache_writer:acquire/1, fun erllama_cache_writer:release/0},
    {Busy, BusyRatio} = wake_up(100, Ours, fun nap/0, fun look_out/1),
    {Resting, RestingRatio} = wake_up(200, Ours, fun nap/0, fun rest/1),
    {Awake, AwakeRatio} = wake_up(2000, Ours, fun no_nap/0, fun rest/1),
    Plain = wake_ups(50, {fun plain_semaphore:acquire/1, fun plain_semaphore:release/0},
                     fun no_nap/0, fun rest/1),
    say_summary("from release to the waiter running, the VM asleep before, the releaser busy after",
                wake_up_rows(Busy)),
    say_summary("the same, the releaser at rest after", wake_up_rows(Resting)),
    say_summary("the same, the VM awake before",
                wake_up_rows(Awake) ++ [{"plain Erlang", bench_report:summary(Plain)}]),
    #{this := #{p99 := P99}} = Busy,
    {
        [{wake_busy, BusyRatio}, {wake_awake, AwakeRatio}, {wake_busy_p99, P99 / 1000}],
        #{wake_up_busy_ns => Busy, wake_up_resting_ns => Resting, wake_up_awake_ns => Awake,
          wake_up_resting_ratio => RestingRatio, wake_up_plain_ns => bench_report:summary(Plain)}
    }.

wake_up_rows(#{message := Message, this := This}) ->
    [{"plain message", Message}, {"this", This}].

%% Ten batches of each, in turns: both sides' samples, and the median ratio of the batches' medians.
wake_up(Batch, Ours, Before, After) ->
    Batches = [
        {messages(Batch, Before, After), wake_ups(Batch, Ours, Before, After)}
     || _ <- lists:seq(1, 10)
    ],
    {Messages, WakeUps} = lists:unzip(Batches),
    Ratio = bench_report:median([
        bench_report:median(O) / bench_report:median(M) || {M, O} <- Batches
    ]),
    Summary = fun(Samples) -> bench_report:summary(lists:append(Samples)) end,
    {#{message => Summary(Messages), this => Summary(WakeUps)}, Ratio}.

messages(Samples, Before, After) ->
    with_sleeper(fun sleeper/1, fun(Sleeper, Woken) ->
        [
            begin
                asleep(Sleeper),
                Before(),
                Sent = now_ns(),
                Sleeper ! wake,
                After(Woken) - Sent
            end
         || _ <- lists:seq(1, Samples)
        ]
    end).

sleeper(Report) ->
    receive wake -> Report(now_ns()) end,
    sleeper(Report).

wake_ups(Samples, {Acquire, Release}, Before, After) ->
    Waiter = fun(Report) -> waiter(Report, Acquire, Release) end,
    with_sleeper(Waiter, fun(Sleeper, Woken) ->
        [
            begin
                ok = Acquire(infinity),
                Sleeper ! wait,
                asleep(Sleeper),
                Before(),
                Released = now_ns(),
                ok = Release(),
                After(Woken) - Released
            end
         || _ <- lists:seq(1, Samples)
        ]
    end).

waiter(Report, Acquire, Release) ->
    receive wait -> ok end,
    ok = Acquire(infinity),
    Woken = now_ns(),
    ok = Release(),
    Report(Woken),
    waiter(Report, Acquire, Release).

%% A process to wake. When it was woken it tells twice: the one who rests by a message, the one who
%% looks out by an atomic.
with_sleeper(Sleep, Measure) ->
    Self = self(),
    Woken = atomics:new(1, []),
    Report = fun(Time) -> atomics:put(Woken, 1, Time), Self ! woken end,
    Sleeper = spawn_link(fun() -> Sleep(Report) end),
    Times = Measure(Sleeper, Woken),
    true = unlink(Sleeper),
    true = exit(Sleeper, kill),
    Times.

nap() -> timer:sleep(1).

no_nap() -> ok.

rest(Woken) ->
    receive woken -> atomics:exchange(Woken, 1, 0) end.

look_out(Woken) ->
    case atomics:get(Woken, 1) of
        0 -> look_out(Woken);
        _ -> rest(Woken)
    end.

asleep(Pid) ->
    case process_info(Pid, [status, message_queue_len]) of
        [{status, waiting}, {message_queue_len, 0}] -> ok;
        _ -> asleep(Pid)
    end.

%% All want the one slot all the time and do nothing with it: what a turn costs.
stampede() ->
    limit(1),
    Turns = 200,
    Ours = fun() -> together([fun() -> pairs(Turns) end || _ <- lists:seq(1, 64)]) end,
    Plain = fun() ->
        together([fun() -> plain_pairs(Turns div 10) end || _ <- lists:seq(1, 64)])
    end,
    OursNs = bench_report:median([nanoseconds(Ours) / (64 * Turns) || _ <- lists:seq(1, ?ROUNDS)]),
    PlainNs = bench_report:median([
        nanoseconds(Plain) / (64 * Turns div 10) || _ <- lists:seq(1, 3)
    ]),
    say("64 contenders, limit 1, per turn", [{"this", OursNs}, {"plain Erlang", PlainNs}]),
    {
        [{stampede, OursNs / 1000}],
        #{stampede_turn_ns => OursNs, stampede_turn_plain_ns => PlainNs}
    }.

queue_of_sixteen() ->
    limit(1),
    Rounds = [
        {
            nanoseconds(fun() -> sleeps(160) end),
            contend(fun erllama_cache_writer:acquire/1, fun erllama_cache_writer:release/0)
        }
     || _ <- lists:seq(1, 3)
    ],
    Ratio = bench_report:median([Total / Alone || {Alone, {Total, _}} <- Rounds]),
    Unfair = bench_report:median([
        begin #{p50 := P50, max := Max} = bench_report:summary(Waits), Max / P50 end
     || {_, {_, Waits}} <- Rounds
    ]),
    {_, {_, Waits}} = lists:last(Rounds),
    {PlainTotal, PlainWaits} =
        contend(fun plain_semaphore:acquire/1, fun plain_semaphore:release/0),
    {Alone, {Total, _}} = lists:last(Rounds),
    say("16 contenders, 10 turns of 2 ms, limit 1, in all", [
        {"160 sleeps alone", Alone}, {"this", Total}, {"plain Erlang", PlainTotal}
    ]),
    say_summary("one contender's wait", [
        {"this", bench_report:summary(Waits)}, {"plain Erlang", bench_report:summary(PlainWaits)}
    ]),
    {
        [{sixteen, Ratio}, {sixteen_unfair, Unfair}],
        #{sixteen_alone_ns => Alone, sixteen_total_ns => Total, sixteen_plain_ns => PlainTotal,
          sixteen_waits_ns => Waits, sixteen_plain_waits_ns => PlainWaits}
    }.

sleeps(0) -> ok;
sleeps(N) -> timer:sleep(2), sleeps(N - 1).

%% How long all of it took, and each contender's waits. Everybody is there when the first begins.
contend(Acquire, Release) ->
    Self = self(),
    Contenders = [
        spawn_link(fun() ->
            receive go -> ok end,
            Self ! {self(), [turn(Acquire, Release) || _ <- lists:seq(1, 10)]}
        end)
     || _ <- lists:seq(1, 16)
    ],
    Begun = now_ns(),
    lists:foreach(fun(Contender) -> Contender ! go end, Contenders),
    Waits = lists:append([receive {Contender, Own} -> Own end || Contender <- Contenders]),
    {now_ns() - Begun, Waits}.

turn(Acquire, Release) ->
    Asked = now_ns(),
    ok = Acquire(infinity),
    Wait = now_ns() - Asked,
    timer:sleep(2),
    ok = Release(),
    Wait.

%%% Ends

killed_owner() ->
    limit(1),
    Samples = [kill_one() || _ <- lists:seq(1, bench_report:large(3000))],
    Summary = bench_report:summary(Samples),
    say_summary("from an owner's kill to the next waiter running", [{"this", Summary}]),
    #{p99 := P99} = Summary,
    {
        [{killed_owner, P99 / 1000}],
        #{killed_owner_ns => Summary}
    }.

kill_one() ->
    Self = self(),
    Holder = spawn(fun() ->
        ok = erllama_cache_writer:acquire(infinity),
        Self ! {self(), holds},
        receive never -> ok end
    end),
    receive {Holder, holds} -> ok end,
    Waiter = spawn_link(fun() ->
        ok = erllama_cache_writer:acquire(infinity),
        Self ! {self(), now_ns()}
    end),
    asleep(Waiter),
    Killed = now_ns(),
    true = exit(Holder, kill),
    receive {Waiter, Woken} -> Woken - Killed end.

%% Ten thousand processes queue and give up, against as many that only sleep as long: what is left
%% is the queueing, the giving up, and nothing that grows with the queue. Beside it, the same with
%% what a process's first acquire makes and its end takes away.
ten_thousand_timeouts() ->
    limit(1),
    ok = erllama_cache_writer:acquire(infinity),
    N = bench_report:large(10000),
    Timeout = 300,
    First = fun() -> erllama_cache_writer:acquire(0) end,
    Sleep = fun() -> receive never -> ok after Timeout -> {error, max_concurrent} end end,
    Wait = fun() -> erllama_cache_writer:acquire(Timeout) end,
    Rounds = [
        {all_give_up(N, First, Sleep), all_give_up(N, First, Wait), all_give_up(N, Sleep, Sleep),
         all_give_up(N, Wait, Wait)}
     || _ <- lists:seq(1, ?ROUNDS)
    ],
    Each = bench_report:median([(W - S) / N || {{_, S}, {_, W}, _, _} <- Rounds]),
    WithLife = bench_report:median([(L - S) / N || {_, _, {S, _}, {L, _}} <- Rounds]),
    ok = erllama_cache_writer:release(),
    say("10,000 waiters that give up, processor time of each beyond a sleep as long", [
        {"this", Each}, {"with start and exit", WithLife}
    ]),
    {
        [{timeouts, Each / 1000}],
        #{timeout_each_ns => Each, timeout_with_life_ns => WithLife}
    }.

%% The processor's time, not the clock's, for most of it is spent asleep: of everything from the
%% first spawn to the last exit, and of the second act alone.
all_give_up(N, First, Second) ->
    Self = self(),
    Begun = cpu_ns(),
    Processes = [
        spawn_monitor(fun() ->
            {error, max_concurrent} = First(),
            Self ! ready,
            receive go -> ok end,
            {error, max_concurrent} = Second(),
            Self ! done,
            receive leave -> ok end
        end)
     || _ <- lists:seq(1, N)
    ],
    gather(N, ready),
    Ready = cpu_ns(),
    [Pid ! go || {Pid, _} <- Processes],
    gather(N, done),
    Done = cpu_ns(),
    [Pid ! leave || {Pid, _} <- Processes],
    [receive {'DOWN', _, process, _, normal} -> ok end || _ <- Processes],
    {cpu_ns() - Begun - (Done - Ready), Done - Ready}.

gather(0, _) -> ok;
gather(N, Message) -> receive Message -> gather(N - 1, Message) end.

%%% Measuring

now_ns() ->
    erlang:monotonic_time(nanosecond).

%% The processor time of the whole VM, exact to a millisecond.
cpu_ns() ->
    {Milliseconds, _} = statistics(runtime),
    Milliseconds * 1000000.

nanoseconds(Fun) ->
    Begun = now_ns(),
    _ = Fun(),
    now_ns() - Begun.

%% Nanoseconds for each of the functions' operations, the functions taking turns.
rounds(Funs) ->
    [Fun() || {Fun, _} <- Funs],
    [[nanoseconds(Fun) / Count || {Fun, Count} <- Funs] || _ <- lists:seq(1, ?ROUNDS)].

medians([First | _] = Rounds) ->
    [
        bench_report:median([lists:nth(N, Round) || Round <- Rounds])
     || N <- lists:seq(1, length(First))
    ].

%% The median of each round's own ratio: a processor that changes its pace between rounds, but not
%% within one, does not show in it.
ratio(Side, To, Rounds) ->
    bench_report:median([lists:nth(Side, Round) / lists:nth(To, Round) || Round <- Rounds]).

together(Funs) ->
    Monitors = [spawn_monitor(Fun) || Fun <- Funs],
    [receive {'DOWN', Monitor, process, Pid, normal} -> ok end || {Pid, Monitor} <- Monitors],
    ok.

say(What, Rows) ->
    io:format("~n~ts~n", [What]),
    [io:format("  ~-22ts ~12.3f us~n", [Name, Ns / 1000]) || {Name, Ns} <- Rows],
    ok.

say_summary(What, Rows) ->
    io:format("~n~ts~n", [What]),
    [
        io:format("  ~-22ts p50 ~10.1f  p99 ~10.1f  max ~10.1f us~n", [
            Name, P50 / 1000, P99 / 1000, Max / 1000
        ])
     || {Name, #{p50 := P50, p99 := P99, max := Max}} <- Rows
    ],
    ok.
