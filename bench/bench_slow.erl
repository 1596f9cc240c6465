%% What others in the node wait for while the disk is slow: `make bench-slow'. Each sync of the
%% library takes 30 ms longer, each read of it 20 ms (proofs/faults/iofault.c is preloaded).
%% Meanwhile a dirty I/O scheduler is wanted by small saves, large ones, large ones that are killed,
%% loads, and a store that starts on many files. Another process looks at a file with OTP's call,
%% which needs such a scheduler too and no slow disk. Files are in $BENCH_DISK,
%% default /tmp.
-module(bench_slow).

-export([main/0]).

-define(KIB, 1024).
-define(MIB, 1048576).
-define(STORE, slow_store).
-define(FILES, 40).
%% Milliseconds.
-define(RUN, 20000).
-define(KILLED_AFTER, 40).

main() ->
    bench_report:main(slow, fun run/0).

run() ->
    Slowest = lists:max([list_to_integer(os:getenv(Variable))
                         || Variable <- ["IOFAULT_SYNC_MS", "IOFAULT_READ_MS"]]),
    Base = filename:join(os:getenv("BENCH_DISK", "/tmp"), "erllama_cache_bench." ++ os:getpid()),
    [Root, Other] = [make_root(Base, Name) || Name <- ["used", "started"]],
    try
        measure(Root, Other, Slowest)
    after
        file:del_dir_r(Base)
    end.

make_root(Base, Name) ->
    Root = filename:join(Base, Name),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    Root.

measure(Root, Other, Slowest) ->
    {ok, _} = erllama_cache_writer:start_link(#{
        host => erllama_cache_store, max_concurrent => 16, slow_save_ms => 600000
    }),
    %% What the starting store finds.
    {ok, Starting} = start(Other),
    Some = rand:bytes(4 * ?KIB),
    Savers = [spawn_monitor(fun() -> {ok, _} = save(Some) end) || _ <- lists:seq(1, ?FILES)],
    [receive {'DOWN', Monitor, process, Pid, Why} -> normal = Why end || {Pid, Monitor} <- Savers],
    ok = gen_server:stop(Starting),
    {ok, Store} = start(Root),
    Large = rand:bytes(64 * ?MIB),
    Middle = binary:part(Large, 0, 8 * ?MIB),
    Stored = [begin {ok, Key} = save(Middle), Key end || _ <- [1, 2, 3, 4]],
    Alone = look(Root, 2000),
    Load = [
        {16, "small saves", fun() -> saved_and_deleted(Some) end},
        {4, "large saves", fun() -> saved_and_deleted(Large) end},
        {4, "large saves, killed", fun() -> killed(Large) end},
        {8, "loads", fun() -> {ok, _, _} = erllama_cache_store:load(?STORE, one_of(Stored)) end},
        {1, "starts", fun() -> started(Other) end}
    ],
    Counts = [{What, counters:new(1, [])} || {_, What, _} <- Load],
    Workers = [
        spawn_monitor(fun() -> work(Fun, proplists:get_value(What, Counts)) end)
     || {Many, What, Fun} <- Load, _ <- lists:seq(1, Many)
    ],
    Beside = look(Root, ?RUN),
    [exit(Pid, kill) || {Pid, _} <- Workers],
    [receive {'DOWN', Monitor, process, Pid, Why} -> killed = Why end || {Pid, Monitor} <- Workers],
    Done = [{What, counters:get(Counter, 1)} || {What, Counter} <- Counts],
    ok = gen_server:stop(Store),
    report(Alone, Beside, Done, Slowest).

start(Root) ->
    erllama_cache_store:start_link(?STORE, #{root => Root}).

report(Alone, Beside, Done, Slowest) ->
    io:format("~nread_file_info (milliseconds: p50, p99, max)~n"),
    [
        io:format("  ~-20ts ~9.3f ~9.3f ~9.3f   ~w calls~n",
                  [Name, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6, N])
     || {Name, #{p50 := P50, p99 := P99, max := Max, n := N}} <-
            [{"alone", Alone}, {"beside a slow disk", Beside}]
    ],
    io:format("  meanwhile: ~ts~n",
              [lists:join(", ", [io_lib:format("~w ~ts", [N, What]) || {What, N} <- Done])]),
    %% Each kind of work has been done, or nothing is shown.
    [] = [What || {What, 0} <- Done],
    #{p99 := P99} = Beside,
    {[{neighbour, P99 / 1.0e6 / Slowest}], #{
        slowest_ms => Slowest, alone_ns => Alone, beside_ns => Beside, done => maps:from_list(Done)
    }}.

%%% Work

work(Fun, Counter) ->
    _ = Fun(),
    ok = counters:add(Counter, 1, 1),
    work(Fun, Counter).

saved_and_deleted(Payload) ->
    {ok, Key} = save(Payload),
    ok = erllama_cache_store:delete(?STORE, Key).

killed(Payload) ->
    {Pid, Monitor} = spawn_monitor(fun() -> save(Payload) end),
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    after ?KILLED_AFTER ->
        true = exit(Pid, kill),
        receive {'DOWN', Monitor, process, Pid, _} -> ok end
    end.

started(Root) ->
    {ok, Store} = erllama_cache_store:start_link(starting_store, #{root => Root}),
    #{files := ?FILES} = erllama_cache_store:info(starting_store),
    ok = gen_server:stop(Store).

save(Payload) ->
    erllama_cache_writer:save(?STORE, disk, #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<1:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, context_size => 4096,
        tokens => [erlang:unique_integer([positive]) || _ <- lists:seq(1, 64)]
    }, Payload, infinity).

one_of(List) ->
    lists:nth(rand:uniform(length(List)), List).

%%% Another process

look(Root, Ms) ->
    Until = erlang:monotonic_time(millisecond) + Ms,
    bench_report:summary(look_until(Root, Until, [])).

look_until(Root, Until, Times) ->
    Begun = erlang:monotonic_time(nanosecond),
    {ok, _} = file:read_file_info(Root),
    Ended = erlang:monotonic_time(nanosecond),
    timer:sleep(1),
    case erlang:monotonic_time(millisecond) < Until of
        true -> look_until(Root, Until, [Ended - Begun | Times]);
        false -> [Ended - Begun | Times]
    end.
