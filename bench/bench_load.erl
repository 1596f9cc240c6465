%% Loads from the page cache, beside a bare read of the same bytes: parts of `make bench-save'.
-module(bench_load).

-export([alone/2, at_once/2]).

-import(bench_sides, [meta/1, fresh/0, remove/2, with_store/3]).
-import(bench_turns, [order/2, in_turns/1, file_name/1, payload/1, mib/1, size_name/1]).

-define(STORE, bench_store).
%% So many loads at once, of so many MiB each.
-define(LOADS, 8).
-define(MIB_EACH, 64).
-define(ROUNDS, 9).

%% Loads of each of these sizes, so many rounds of each.
-spec alone(Root :: binary(), [{Bytes :: pos_integer(), Rounds :: pos_integer()}]) ->
    #{Bytes :: pos_integer() => map()}.
alone(Root, Sizes) ->
    with_store(Root, disk, fun() ->
        Rows = [{Bytes, rounds(Root, Bytes, Rounds)} || {Bytes, Rounds} <- Sizes],
        io:format("~nload, warm (milliseconds: p50, p99, max; times the floor)~n"),
        lists:foreach(fun say_row/1, Rows),
        maps:from_list(Rows)
    end).

say_row({Bytes, #{ratio := Ratio} = Row}) ->
    io:format("  ~9ts", [size_name(Bytes)]),
    [
        begin
            #{Side := #{p50 := P50, p99 := P99, max := Max}} = Row,
            io:format("   ~ts ~9.3f ~9.3f ~9.3f", [Side, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6])
        end
     || Side <- [floor, this]
    ],
    io:format("   ~.2f~n", [Ratio]).

rounds(Root, Bytes, Rounds) ->
    Key = saved(Bytes),
    Sides = [{Side, loader(Side, Root, Key, Bytes)} || Side <- [floor, this]],
    in_turns(Sides),
    Samples = [in_turns(order(Round, Sides)) || Round <- lists:seq(1, Rounds)],
    remove(Root, Key),
    Of = fun(Side) -> [proplists:get_value(Side, Round) || Round <- Samples] end,
    #{
        floor => bench_report:summary(Of(floor)),
        this => bench_report:summary(Of(this)),
        ratio => bench_report:median([T / F || {F, T} <- lists:zip(Of(floor), Of(this))]),
        above => bench_report:median([T - F || {F, T} <- lists:zip(Of(floor), Of(this))])
    }.

saved(Bytes) ->
    {ok, Key} = erllama_cache_writer:save(?STORE, disk, meta(fresh()), payload(Bytes)),
    Key.

loader(floor, Root, Key, Bytes) ->
    File = filename:join(Root, file_name(Key)),
    Offset = filelib:file_size(File) - Bytes,
    fun() -> Bytes = byte_size(bench_nif:floor_load(File, Offset)) end;
loader(this, _Root, Key, Bytes) ->
    fun() ->
        {ok, _, Loaded} = erllama_cache_store:load(?STORE, Key),
        Bytes = byte_size(Loaded)
    end.

%% Bytes per second of several loads at once, each of a file of its own.
-spec at_once(Root :: binary(), erllama_cache_host:tier()) ->
    #{floor := number(), this := number(), percent := number()}.
at_once(Root, Tier) ->
    with_store(Root, Tier, fun() ->
        Bytes = mib(?MIB_EACH),
        Keys = [saved(Bytes) || _ <- lists:seq(1, ?LOADS)],
        Sides = [{Side, [loader(Side, Root, Key, Bytes) || Key <- Keys]} || Side <- [floor, this]],
        Rounds = [
            [{Side, ?LOADS * Bytes / (took(Loaders) / 1.0e9)}
             || {Side, Loaders} <- order(Round, Sides)]
         || Round <- lists:seq(1, ?ROUNDS)
        ],
        [remove(Root, Key) || Key <- Keys],
        %% The first warms up.
        Of = fun(Side) -> [proplists:get_value(Side, Round) || Round <- tl(Rounds)] end,
        [Floor, This] = [bench_report:median(Of(Side)) || Side <- [floor, this]],
        Percent = bench_report:median([100 * T / F || {F, T} <- lists:zip(Of(floor), Of(this))]),
        io:format("~n~w loads of ~ts at once, warm: floor ~.2f GB/s, this ~.2f GB/s, ~.1f %~n",
                  [?LOADS, size_name(Bytes), Floor / 1.0e9, This / 1.0e9, Percent]),
        #{floor => Floor, this => This, percent => Percent}
    end).

%% Until the last has ended.
took(Loaders) ->
    Self = self(),
    Loading = [
        spawn_monitor(fun() ->
            Self ! {ready, self()},
            receive load -> Load() end
        end)
     || Load <- Loaders
    ],
    [receive {ready, Pid} -> ok end || {Pid, _} <- Loading],
    Begun = erlang:monotonic_time(nanosecond),
    [Pid ! load || {Pid, _} <- Loading],
    [receive {'DOWN', Monitor, process, Pid, normal} -> ok end || {Pid, Monitor} <- Loading],
    erlang:monotonic_time(nanosecond) - Begun.
