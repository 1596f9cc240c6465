%% Saves and loads beside the bare floor and the plain Erlang way, in one VM, on one root and in
%% turns: `make bench-save'. Roots are made in $BENCH_DISK (a disk, see disk.sh), in $BENCH_RAM (a
%% tmpfs, default /dev/shm), and in the other file systems of $BENCH_FILE_SYSTEMS (`name=directory',
%% separated by blanks), and removed again. $BENCH_PARTS chooses parts by number, $BENCH_SIZES sizes
%% in KiB, both with commas.
-module(bench_save).

-export([main/0]).

-import(bench_sides, [side/4, once/1, remove/2, with_store/3]).
-import(bench_turns, [order/2, new_root/1, new_root/2, payload/1, mib/1, size_name/1]).

-define(KIB, 1024).
-define(MIB, 1048576).
%% Milliseconds.
-define(WARM_UP, 500).
-define(REST, 3).

main() ->
    bench_report:main(save, fun run/0).

run() ->
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store, max_concurrent => 16}),
    {ok, _} = plain_semaphore:start_link(16),
    Disk = new_root("BENCH_DISK", "/tmp"),
    Ram = new_root("BENCH_RAM", "/dev/shm"),
    Others = other_roots(os:getenv("BENCH_FILE_SYSTEMS", "")),
    Parts = [
        fun() -> saves(disk, Disk) end, fun() -> saves(ram_file, Ram) end,
        fun() -> loads(Disk) end, fun() -> writers(Disk) end,
        fun() -> bench_costs:processor(Disk) end, fun() -> bench_costs:memory(Disk) end,
        fun() -> bench_costs:long_calls(Disk) end, fun() -> bench_costs:neighbours(Disk) end,
        fun() -> bench_costs:start(Ram) end, fun() -> bench_costs:stands_still(Disk) end,
        fun() -> others(Others) end
    ],
    Wanted = case os:getenv("BENCH_PARTS") of
        false -> lists:seq(1, length(Parts));
        Some -> [list_to_integer(N) || N <- string:lexemes(Some, ",")]
    end,
    try
        {Values, Figures} = lists:unzip([(lists:nth(N, Parts))() || N <- Wanted]),
        {lists:append(Values), lists:foldl(fun maps:merge/2, #{}, Figures)}
    after
        [file:del_dir_r(Root) || Root <- [Disk, Ram | [Root || {_, Root} <- Others]]]
    end.

other_roots(Given) ->
    [
        begin
            [Name, Directory] = string:split(Each, "="),
            {list_to_atom(Name), new_root(Directory)}
        end
     || Each <- string:lexemes(Given, " ")
    ].

%%% Saves

%% Bytes, by what bounds.config calls them, rounds, rounds of the plain side, which is slow and does
%% not vary, and saves in one turn: what small ones take is not to be what the side before has left
%% behind, a cold processor and threads of the VM that spin. What they take in the cold is measured
%% by itself.
sizes() ->
    All = [
        {'4k', 4 * ?KIB, 100, 100, 10}, {'64k', 64 * ?KIB, 50, 50, 10}, {'1m', ?MIB, 24, 6, 5},
        {'4m', mib(4), 24, 6, 2}, {'16m', mib(16), 24, 6, 1}, {'64m', mib(64), 15, 3, 1},
        {'256m', mib(256), 7, 3, 1}, {'1g', mib(1024), 7, 1, 1}
    ],
    Fewer = [
        {Id, Bytes, bench_report:rounds(Rounds), bench_report:rounds(Plain), Each}
     || {Id, Bytes, Rounds, Plain, Each} <- All
    ],
    case os:getenv("BENCH_SIZES") of
        false ->
            Fewer;
        Some ->
            Wanted = [list_to_integer(Size) * ?KIB || Size <- string:lexemes(Some, ",")],
            [Size || Size <- Fewer, lists:member(element(2, Size), Wanted)]
    end.

saves(Tier, Root) ->
    with_store(Root, Tier, fun() ->
        Rows = [{Id, Bytes, save_rounds(Tier, Root, Bytes, Rounds, Plain, Each)}
                || {Id, Bytes, Rounds, Plain, Each} <- sizes()],
        Title = case Tier of disk -> "save, disk, BLAKE3 on"; ram_file -> "save, tmpfs" end,
        io:format("~n~ts (milliseconds: p50, p99, max; times the floor)~n", [Title]),
        [say_row(size_name(Bytes), Row) || {_, Bytes, Row} <- Rows],
        Rested = rested(Tier, Root),
        say_row("4 KiB *", Rested),
        io:format("  * alone, after a rest of ~w ms~n", [?REST]),
        Figures = #{{save, Tier} => by_size(Rows), {rested, Tier} => Rested},
        {save_values(Tier, Rows), Figures}
    end).

by_size(Rows) ->
    maps:from_list([{Bytes, Row} || {_, Bytes, Row} <- Rows]).

save_rounds(Tier, Root, Bytes, Rounds, PlainRounds, Each) ->
    Sides = [Side || {Name, _} = Side <- sides(Tier, Root, Bytes),
                     Name =/= plain orelse PlainRounds > 0],
    warm_up(Root, Sides, erlang:monotonic_time(millisecond) + ?WARM_UP),
    summaries([
        [{Name, timed(Root, Side, Each)} || {Name, Side} <- order(Round, Sides),
                                           Name =/= plain orelse Round =< PlainRounds]
     || Round <- lists:seq(1, Rounds)
    ]).

%% A small save that finds its code in no cache, as one does that comes after other work.
rested(Tier, Root) ->
    Sides = sides(Tier, Root, 4 * ?KIB),
    Rest = fun(Save) -> timer:sleep(?REST), Save() end,
    summaries([
        [{Name, Rest(fun() -> timed(Root, Side, 1) end)} || {Name, Side} <- order(Round, Sides)]
     || Round <- lists:seq(1, 100)
    ]).

sides(Tier, Root, Bytes) ->
    Payload = payload(Bytes),
    [{Name, side(Name, Tier, Root, Payload)} || Name <- [floor, this, plain]].

summaries(Rounds) ->
    Of = fun(Side) -> lists:append([proplists:get_value(Side, Round, []) || Round <- Rounds]) end,
    Took = fun(Side, Round) -> lists:sum(proplists:get_value(Side, Round)) end,
    Sides = [Side || Side <- [floor, this, plain], Of(Side) =/= []],
    Summaries = maps:from_list([{Side, bench_report:summary(Of(Side))} || Side <- Sides]),
    Ratios = [Took(this, Round) / Took(floor, Round) || Round <- Rounds],
    Summaries#{ratio => bench_report:median(Ratios)}.

%% Everything once at least.
warm_up(Root, Sides, Until) ->
    [remove(Root, once(Side)) || {_, Side} <- Sides],
    erlang:monotonic_time(millisecond) < Until andalso warm_up(Root, Sides, Until).

%% One turn: what each of so many saves takes.
timed(Root, {Prepare, Save}, Saves) ->
    Prepared = [Prepare() || _ <- lists:seq(1, Saves)],
    Timed = [
        begin
            Begun = erlang:monotonic_time(nanosecond),
            Key = Save(Each),
            {erlang:monotonic_time(nanosecond) - Begun, Key}
        end
     || Each <- Prepared
    ],
    [remove(Root, Key) || {_, Key} <- Timed],
    [Time || {Time, _} <- Timed].

say_row(Name, #{ratio := Ratio} = Row) ->
    io:format("  ~9ts", [Name]),
    [
        begin
            #{Side := #{p50 := P50, p99 := P99, max := Max}} = Row,
            io:format("   ~ts ~9.3f ~9.3f ~9.3f", [Side, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6])
        end
     || Side <- [floor, this, plain], is_map_key(Side, Row)
    ],
    io:format("   ~.2f~n", [Ratio]).

%% The rows that have bounds.
save_values(disk, Rows) ->
    times_floor(disk, Rows) ++
        [{Id, as_plain(Row)}
         || {Size, _, Row} <- Rows, {Of, Id} <- [{'256m', disk_256m_plain}, {'1g', disk_1g_plain}],
            Size =:= Of];
save_values(ram_file, Rows) ->
    Wanted = [Row || {Size, _, _} = Row <- Rows, lists:member(Size, ['4k', '1m', '16m', '256m'])],
    times_floor(ram, Wanted) ++
        [{Id, as_plain(Row)}
         || {Size, _, Row} <- Rows, {Of, Id} <- [{'4k', ram_4k_plain}, {'256m', ram_256m_plain}],
            Size =:= Of].

times_floor(FileSystem, Rows) ->
    [{bound_id(FileSystem, Size), Ratio} || {Size, _, #{ratio := Ratio}} <- Rows].

bound_id(What, Size) ->
    list_to_atom(lists:concat([What, "_", Size])).

as_plain(#{plain := #{p50 := Plain}, this := #{p50 := This}}) -> Plain / This.

%% The same on other file systems, without the plain side.
others(Roots) ->
    Each = [
        with_store(Root, disk, fun() ->
            Rows = [{Id, Bytes, save_rounds(disk, Root, Bytes, max(7, Rounds div 2), 0, Turn)}
                    || {Id, Bytes, Rounds, _, Turn} <- sizes()],
            io:format("~nsave, ~ts (milliseconds: p50, p99, max; times the floor)~n", [Name]),
            [say_row(size_name(Bytes), Row) || {_, Bytes, Row} <- Rows],
            {times_floor(Name, Rows), {{save, Name}, by_size(Rows)}}
        end)
     || {Name, Root} <- Roots
    ],
    {Values, Figures} = lists:unzip(Each),
    {lists:append(Values), maps:from_list(Figures)}.

%%% Loads, warm

loads(Root) ->
    Rows = bench_load:alone(Root, [{Bytes, Rounds * Each}
                                   || {_, Bytes, Rounds, _, Each} <- sizes()]),
    #{percent := Percent} = AtOnce = bench_load:at_once(Root, disk),
    Values = [
        {bound_id(load, Id), load_value(Bytes, maps:get(Bytes, Rows))}
     || {Id, Bytes, _, _, _} <- sizes(), Id =/= '4m'
    ],
    {[{load_at_once, Percent} | Values], #{load => Rows, load_at_once => AtOnce}}.

%% Small ones in microseconds above the floor, large ones in times the floor.
load_value(Bytes, #{above := Above}) when Bytes =< ?MIB -> Above / 1.0e3;
load_value(_Bytes, #{ratio := Ratio}) -> Ratio.

%%% Many writers

writers(Root) ->
    with_store(Root, disk, fun() ->
        Rows = [
            {{Writers, Bytes}, writer_rounds(Root, Writers, Bytes, Each)}
         || {Bytes, Each} <- [{64 * ?KIB, 40}, {mib(16), 4}], Writers <- [1, 4, 16]
        ],
        io:format("~nwriters at once, disk (saves per second)~n"),
        [
            io:format("  ~2w of ~6ts   floor ~8.1f   this ~8.1f   plain ~8.1f~n",
                      [Writers, size_name(Bytes), Floor, This, Plain])
         || {{Writers, Bytes}, #{floor := Floor, this := This, plain := Plain}} <- Rows
        ],
        [{_, #{this := This, plain := Plain}}, {_, #{ratio := Ratio}}] =
            [Row || {{16, _}, _} = Row <- Rows],
        {
            [{writers, This / Plain}, {writers_16m, Ratio}],
            #{writers => maps:from_list([
                {lists:flatten(io_lib:format("~w of ~ts", [W, size_name(B)])), Row}
             || {{W, B}, Row} <- Rows])}
        }
    end).

writer_rounds(Root, Writers, Bytes, Each) ->
    Sides = sides(disk, Root, Bytes),
    Rates = [
        [{Name, rate(Root, Side, Writers, Each)} || {Name, Side} <- order(Round, Sides)]
     || Round <- lists:seq(1, 6)
    ],
    Of = fun(Name) -> [proplists:get_value(Name, Round) || Round <- Rates] end,
    Medians = [{Name, bench_report:median(Of(Name))} || {Name, _} <- Sides],
    Ratios = [This / Floor || {This, Floor} <- lists:zip(Of(this), Of(floor))],
    maps:from_list([{ratio, bench_report:median(Ratios)} | Medians]).

rate(Root, {Prepare, Save}, Writers, Each) ->
    Self = self(),
    Pids = [
        spawn_link(fun() ->
            Prepared = [Prepare() || _ <- lists:seq(1, Each)],
            Self ! ready,
            receive go -> ok end,
            Self ! {self(), [Save(P) || P <- Prepared]}
        end)
     || _ <- lists:seq(1, Writers)
    ],
    [receive ready -> ok end || _ <- Pids],
    Begun = erlang:monotonic_time(nanosecond),
    [Pid ! go || Pid <- Pids],
    Names = [receive {Pid, Own} -> Own end || Pid <- Pids],
    Time = erlang:monotonic_time(nanosecond) - Begun,
    [remove(Root, Name) || Name <- lists:append(Names)],
    Writers * Each / (Time / 1.0e9).
