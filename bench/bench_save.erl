%% Saves and loads beside the bare floor and the plain Erlang way, in one VM, on one root and in
%% turns: `make bench-save'. Roots are made in $BENCH_DISK (a disk, see disk.sh) and
%% $BENCH_RAM (a tmpfs, default /dev/shm), and removed again. $BENCH_PARTS chooses parts by number,
%% $BENCH_SIZES sizes in KiB, both with commas.
-module(bench_save).

-export([main/0]).

-import(bench_turns, [
    order/2, in_turns/1, nanoseconds/1, new_root/2, file_name/1, payload/1
]).

-define(KIB, 1024).
-define(MIB, 1048576).
-define(TOKENS, 2048).
%% Milliseconds.
-define(WARM_UP, 500).
-define(REST, 3).
-define(STORE, bench_store).

main() ->
    bench_report:main(save, fun run/0).

run() ->
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store, max_concurrent => 16}),
    {ok, _} = plain_semaphore:start_link(16),
    Disk = new_root("BENCH_DISK", "/tmp"),
    Ram = new_root("BENCH_RAM", "/dev/shm"),
    Parts = [
        fun() -> saves(disk, Disk) end, fun() -> saves(ram_file, Ram) end,
        fun() -> loads(disk, Disk) end, fun() -> writers(Disk) end, fun() -> processor(Disk) end,
        fun() -> memory(Disk) end, fun() -> long_calls(Disk) end, fun() -> neighbours(Disk) end,
        fun() -> start(Ram) end, fun() -> stands_still(Disk) end
    ],
    Wanted = case os:getenv("BENCH_PARTS") of
        false -> lists:seq(1, length(Parts));
        Some -> [list_to_integer(N) || N <- string:lexemes(Some, ",")]
    end,
    try
        {Values, Figures} = lists:unzip([(lists:nth(N, Parts))() || N <- Wanted]),
        {lists:append(Values), lists:foldl(fun maps:merge/2, #{}, Figures)}
    after
        [file:del_dir_r(Root) || Root <- [Disk, Ram]]
    end.

%%% Sides: each makes one file and says what it is called. What a caller has at hand, the metadata,
%%% is made before the clock runs.

meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<N:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, context_size => 4096,
        tokens => lists:seq(1, ?TOKENS)
    }.

%% Never the same twice.
fresh() ->
    erlang:unique_integer([positive]).

%% As many bytes as the real one: nobody looks at what they are.
prefix() ->
    binary:copy(<<0>>, 72 + 8 + 5 * 5 + 70 + 5 + 4 * ?TOKENS + 38 + 24).

side(floor, _Tier, Root, Payload) ->
    Prefix = prefix(),
    {
        fun() -> <<(fresh()):256>> end,
        fun(Key) -> true = bench_nif:floor_save(Root, file_name(Key), Prefix, Payload), Key end
    };
side(plain, _Tier, _Root, Payload) ->
    Save = fun(Meta) -> {ok, Key} = plain_writer:save(Meta, Payload), Key end,
    {fun() -> meta(fresh()) end, Save};
side(this, Tier, _Root, Payload) ->
    {
        fun() -> meta(fresh()) end,
        fun(Meta) -> {ok, Key} = erllama_cache_writer:save(?STORE, Tier, Meta, Payload), Key end
    }.

once({Prepare, Save}) ->
    Save(Prepare()).

remove(Root, Key) ->
    _ = file:delete(filename:join(Root, file_name(Key))),
    ok = erllama_cache_store:delete(?STORE, Key).

with_store(Root, Tier, Fun) ->
    {ok, Store} = erllama_cache_store:start_link(?STORE, #{root => Root, tier => Tier}),
    {ok, Plain} = plain_writer:start_link(Root),
    try Fun() after [gen_server:stop(Server) || Server <- [Store, Plain]] end.

%%% Saves

%% Bytes, rounds, rounds of the plain side, which is slow and does not vary, and saves in one turn:
%% what small ones take is not to be what the side before has left behind, a cold processor and
%% threads of the VM that spin. What they take in the cold is measured by itself.
sizes() ->
    All = [{4 * ?KIB, 100, 100, 10}, {64 * ?KIB, 50, 50, 10}, {?MIB, 12, 6, 5},
           {large(16), 15, 7, 1}, {large(256), 7, 3, 1}, {large(1024), 7, 1, 1}],
    case os:getenv("BENCH_SIZES") of
        false ->
            All;
        Some ->
            Wanted = [list_to_integer(Size) * ?KIB || Size <- string:lexemes(Some, ",")],
            [Size || Size <- All, lists:member(element(1, Size), Wanted)]
    end.

saves(Tier, Root) ->
    with_store(Root, Tier, fun() ->
        Rows = [{Bytes, save_rounds(Tier, Root, Bytes, Rounds, Plain, Each)}
                || {Bytes, Rounds, Plain, Each} <- sizes()],
        Title = case Tier of disk -> "save, disk, BLAKE3 on"; ram_file -> "save, tmpfs" end,
        io:format("~n~ts (milliseconds: p50, p99, max; times the floor)~n", [Title]),
        [say_row(size_name(Bytes), Row) || {Bytes, Row} <- Rows],
        Rested = rested(Tier, Root),
        say_row("4 KiB *", Rested),
        io:format("  * alone, after a rest of ~w ms~n", [?REST]),
        Figures = #{{save, Tier} => maps:from_list(Rows), {rested, Tier} => Rested},
        {save_values(Tier, maps:from_list(Rows)), Figures}
    end).

save_rounds(Tier, Root, Bytes, Rounds, PlainRounds, Each) ->
    Sides = sides(Tier, Root, Bytes),
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
    #{floor => bench_report:summary(Of(floor)), this => bench_report:summary(Of(this)),
      plain => bench_report:summary(Of(plain)),
      ratio => bench_report:median([Took(this, Round) / Took(floor, Round) || Round <- Rounds])}.

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

%% A large payload's size.
large(Mib) ->
    bench_report:large(Mib) * ?MIB.

say_row(Name, #{ratio := Ratio} = Row) ->
    io:format("  ~9ts", [Name]),
    [
        begin
            #{Side := #{p50 := P50, p99 := P99, max := Max}} = Row,
            io:format("   ~ts ~9.3f ~9.3f ~9.3f", [Side, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6])
        end
     || Side <- [floor, this, plain]
    ],
    io:format("   ~.2f~n", [Ratio]).

size_name(Bytes) when Bytes >= ?MIB -> integer_to_list(Bytes div ?MIB) ++ " MiB";
size_name(Bytes) -> integer_to_list(Bytes div ?KIB) ++ " KiB".

save_values(disk, Rows) ->
    values(Rows, [
        {256 * ?MIB, fun times_floor/1, disk_256m}, {1024 * ?MIB, fun times_floor/1, disk_1g},
        {256 * ?MIB, fun as_plain/1, disk_256m_plain}, {1024 * ?MIB, fun as_plain/1, disk_1g_plain},
        {4 * ?KIB, fun times_floor/1, disk_4k}, {64 * ?KIB, fun times_floor/1, disk_64k}
    ]);
save_values(ram_file, Rows) ->
    values(Rows, [
        {256 * ?MIB, fun times_floor/1, ram_256m}, {256 * ?MIB, fun as_plain/1, ram_256m_plain},
        {4 * ?KIB, fun as_plain/1, ram_4k_plain}
    ]).

%% Of the sizes that were measured.
values(Rows, Wanted) ->
    [{Id, Of(Row)} || {Bytes, Of, Id} <- Wanted, {ok, Row} <- [maps:find(Bytes, Rows)]].

times_floor(#{ratio := Ratio}) -> Ratio.

as_plain(#{plain := #{p50 := Plain}, this := #{p50 := This}}) -> Plain / This.

%% In microseconds.
above(#{above := Above}) -> Above / 1.0e3.

%%% Loads, warm

loads(Tier, Root) ->
    with_store(Root, Tier, fun() ->
        Rows = [{Bytes, load_rounds(Tier, Root, Bytes, Rounds * Each)}
                || {Bytes, Rounds, _, Each} <- sizes()],
        io:format("~nload, warm (milliseconds: p50, p99, max; times the floor)~n"),
        [
            begin
                io:format("  ~9ts", [size_name(Bytes)]),
                [
                    begin
                        #{Side := #{p50 := P50, p99 := P99, max := Max}} = Row,
                        io:format("   ~ts ~9.3f ~9.3f ~9.3f",
                                  [Side, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6])
                    end
                 || Side <- [floor, this]
                ],
                io:format("   ~.2f~n", [maps:get(ratio, Row)])
            end
         || {Bytes, Row} <- Rows
        ],
        Map = maps:from_list(Rows),
        Wanted = [
            {4 * ?KIB, fun above/1, load_4k}, {64 * ?KIB, fun above/1, load_64k},
            {?MIB, fun above/1, load_1m}, {256 * ?MIB, fun times_floor/1, load_256m}
        ],
        {values(Map, Wanted), #{load => Map}}
    end).

load_rounds(Tier, Root, Bytes, Rounds) ->
    Payload = payload(Bytes),
    {ok, Key} = erllama_cache_writer:save(?STORE, Tier, meta(fresh()), Payload),
    File = filename:join(Root, file_name(Key)),
    Offset = filelib:file_size(File) - Bytes,
    Floor = fun() -> Bytes = byte_size(bench_nif:floor_load(File, Offset)) end,
    This = fun() ->
        {ok, _, Loaded} = erllama_cache_store:load(?STORE, Key),
        Bytes = byte_size(Loaded)
    end,
    Sides = [{floor, Floor}, {this, This}],
    in_turns(Sides),
    Samples = [in_turns(order(Round, Sides)) || Round <- lists:seq(1, Rounds)],
    Of = fun(Side) -> [proplists:get_value(Side, Round) || Round <- Samples] end,
    remove(Root, Key),
    #{
        floor => bench_report:summary(Of(floor)),
        this => bench_report:summary(Of(this)),
        ratio => bench_report:median([T / F || {F, T} <- lists:zip(Of(floor), Of(this))]),
        above => bench_report:median([T - F || {F, T} <- lists:zip(Of(floor), Of(this))])
    }.

%%% Many writers

writers(Root) ->
    with_store(Root, disk, fun() ->
        Rows = [
            {{Writers, Bytes}, writer_rounds(Root, Writers, Bytes, Each)}
         || {Bytes, Each} <- [{64 * ?KIB, 40}, {large(16), 4}], Writers <- [1, 4, 16]
        ],
        io:format("~nwriters at once, disk (saves per second)~n"),
        [
            io:format("  ~2w of ~6ts   floor ~8.1f   this ~8.1f   plain ~8.1f~n",
                      [Writers, size_name(Bytes), Floor, This, Plain])
         || {{Writers, Bytes}, #{floor := Floor, this := This, plain := Plain}} <- Rows
        ],
        {_, #{this := This, plain := Plain}} = lists:keyfind({16, 64 * ?KIB}, 1, Rows),
        {
            [{writers, This / Plain}],
            #{writers => maps:from_list([
                {lists:flatten(io_lib:format("~w of ~ts", [W, size_name(B)])), Row}
             || {{W, B}, Row} <- Rows])}
        }
    end).

writer_rounds(Root, Writers, Bytes, Each) ->
    Payload = payload(Bytes),
    Rates = [
        [{Name, rate(Root, side(Name, disk, Root, Payload), Writers, Each)}
         || Name <- [floor, this, plain]]
     || _ <- lists:seq(1, 5)
    ],
    maps:from_list([
        {Name, bench_report:median([proplists:get_value(Name, Round) || Round <- Rates])}
     || Name <- [floor, this, plain]
    ]).

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

%%% What else a save takes

processor(Root) ->
    with_store(Root, disk, fun() ->
        Payload = payload(large(256)),
        [This, Plain] = [
            bench_report:median([cpu_ms(Root, side(Name, disk, Root, Payload))
                                 || _ <- lists:seq(1, 3)])
         || Name <- [this, plain]
        ],
        io:format("~nprocessor time of a 256 MiB save: this ~w ms, plain ~w ms~n", [This, Plain]),
        {
            [{processor, 100 * This / Plain}],
            #{cpu_ms => This, cpu_plain_ms => Plain}
        }
    end).

cpu_ms(Root, Side) ->
    Before = processor_ms(),
    Name = once(Side),
    After = processor_ms(),
    remove(Root, Name),
    After - Before.

%% User and system time of all threads.
processor_ms() ->
    {ok, Stat} = file:read_file("/proc/self/stat"),
    [_, AfterName] = binary:split(Stat, <<") ">>),
    Fields = binary:split(AfterName, <<" ">>, [global]),
    %% Fields 14 and 15, of which two are before the name's end, in ticks of 10 ms.
    10 * lists:sum([binary_to_integer(lists:nth(N, Fields)) || N <- [12, 13]]).

%% The peak of the VM's resident memory during a save, above what it was before.
memory(Root) ->
    with_store(Root, disk, fun() ->
        Rows = [{Bytes, peak(Root, Bytes)} || Bytes <- [large(256), large(1024)]],
        io:format("~nresident memory above the payload: ~ts~n", [
            lists:join(", ", [io_lib:format("~ts ~w KiB", [size_name(B), K]) || {B, K} <- Rows])
        ]),
        {
            [{memory, lists:max([K || {_, K} <- Rows]) / 1024}],
            #{memory_kib => maps:from_list(Rows)}
        }
    end).

peak(Root, Bytes) ->
    Payload = payload(Bytes),
    Save = side(this, disk, Root, Payload),
    remove(Root, once(Save)),
    true = garbage_collect(),
    %% Makes the peak what it is now.
    ok = file:write_file("/proc/self/clear_refs", "5"),
    Before = status("VmHWM"),
    Name = once(Save),
    Peak = status("VmHWM"),
    remove(Root, Name),
    Peak - Before.

status(Field) ->
    {ok, Status} = file:read_file("/proc/self/status"),
    {match, [Kib]} = re:run(Status, Field ++ ":\\s+(\\d+) kB", [{capture, all_but_first, list}]),
    list_to_integer(Kib).

%% The calls that a save of 4 GiB is made of, one by one.
long_calls(Root) ->
    with_store(Root, disk, fun() ->
        Payload = payload(large(4096)),
        Tracer = self(),
        {Pid, Monitor} = spawn_monitor(fun() ->
            receive go -> ok end,
            {ok, Key} = erllama_cache_writer:save(?STORE, disk, meta(fresh()), Payload),
            exit({saved, Key})
        end),
        Functions = [write_tmp, write_more, publish],
        [1 = erlang:trace_pattern({erllama_cache_nif, F, '_'}, [{'_', [], [{return_trace}]}], [])
         || F <- Functions],
        1 = erlang:trace(Pid, true, [call, running, arity, monotonic_timestamp, {tracer, Tracer}]),
        Pid ! go,
        {Calls, Key} = calls(Pid, Monitor),
        [erlang:trace_pattern({erllama_cache_nif, F, '_'}, false, []) || F <- Functions],
        remove(Root, Key),
        Longest = lists:max([Time || {more, Time, _} <- Calls]),
        Away = lists:max([Time || {more, _, Time} <- Calls]),
        Sync = lists:max([Time || {done, Time, _} <- Calls]),
        io:format("~nlongest NIF call in a 4 GiB save: ~.1f ms of ~w calls, "
                  "~.1f ms until its process ran "
                  "again; the one with the final sync ~.1f ms~n",
                  [Longest / 1.0e6, length(Calls), Away / 1.0e6, Sync / 1.0e6]),
        {
            [{long_call, Longest / 1.0e6}],
            #{longest_call_ns => Longest, longest_away_ns => Away, sync_call_ns => Sync}
        }
    end).

%% Of each call: whether there was more to do, how long it took, and the same with the ways to the
%% dirty scheduler and back, on which others may keep the schedulers busy.
calls(Pid, Monitor) ->
    receive
        {trace_ts, Pid, call, _, Begun} ->
            Time = on_dirty_scheduler(Pid, undefined),
            receive
                {trace_ts, Pid, return_from, _, Result, Ended} ->
                    Progress = case Result of {more, _} -> more; more -> more; _ -> done end,
                    {Calls, Key} = calls(Pid, Monitor),
                    {[{Progress, Time, Ended - Begun} | Calls], Key}
            end;
        {trace_ts, Pid, Move, _, _} when Move =:= in; Move =:= out ->
            calls(Pid, Monitor);
        {'DOWN', Monitor, process, Pid, {saved, Key}} ->
            {[], Key}
    end.

%% When a NIF has ended there, its process is at the function that brings the result back.
on_dirty_scheduler(Pid, Since) ->
    receive
        {trace_ts, Pid, in, _, Begun} -> on_dirty_scheduler(Pid, Begun);
        {trace_ts, Pid, out, {erts_internal, dirty_nif_finalizer, 1}, Ended} -> Ended - Since;
        {trace_ts, Pid, out, _, _} -> on_dirty_scheduler(Pid, Since)
    end.

%% An unrelated call that needs a dirty I/O scheduler too, while 16 saves of 256 MiB run.
neighbours(Root) ->
    with_store(Root, disk, fun() ->
        Payload = payload(large(256)),
        Self = self(),
        Savers = [
            spawn_monitor(fun() ->
                Keys = [
                    begin
                        {ok, Key} = erllama_cache_writer:save(?STORE, disk, meta(fresh()), Payload),
                        Key
                    end
                 || _ <- [1, 2]
                ],
                Self ! {saved, Keys}
            end)
         || _ <- lists:seq(1, 16)
        ],
        Times = look_around(Root, Savers, []),
        [receive {saved, Keys} -> [remove(Root, Key) || Key <- Keys] end || _ <- Savers],
        #{p50 := P50, p99 := P99, max := Max, n := N} = Summary = bench_report:summary(Times),
        io:format("~nread_file_info beside 16 saves of 256 MiB: p50 ~.3f  p99 ~.3f  max ~.3f ms, "
                  "~w calls~n", [P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6, N]),
        {
            [{neighbour, P99 / 1.0e6}],
            #{neighbour_ns => Summary}
        }
    end).

look_around(_Root, [], Times) ->
    Times;
look_around(Root, Savers, Times) ->
    Time = nanoseconds(fun() -> {ok, _} = file:read_file_info(Root) end),
    receive
        {'DOWN', Monitor, process, Pid, normal} ->
            look_around(Root, lists:delete({Pid, Monitor}, Savers), [Time | Times])
    after 1 ->
        look_around(Root, Savers, [Time | Times])
    end.

%%% How long a caller that does not wait for its save stands still

stands_still(Root) ->
    with_store(Root, disk, fun() ->
        Payload = payload(large(256)),
        Times = [
            begin
                Meta = meta(fresh()),
                Begun = erlang:monotonic_time(nanosecond),
                {ok, Ref} = erllama_cache_writer:save_async(?STORE, disk, Meta, Payload),
                Time = erlang:monotonic_time(nanosecond) - Begun,
                receive {erllama_cache_writer, Ref, {ok, Key}} -> remove(Root, Key) end,
                Time
            end
         || _ <- lists:seq(1, 30)
        ],
        #{p50 := P50, p99 := P99, max := Max} = Summary = bench_report:summary(Times),
        io:format("~ncaller of save_async, 256 MiB: p50 ~.1f  p99 ~.1f  max ~.1f us~n",
                  [P50 / 1.0e3, P99 / 1.0e3, Max / 1.0e3]),
        {
            [{async, P99 / 1.0e3}],
            #{async_ns => Summary}
        }
    end).

%%% A store's start

start(Root) ->
    Files = bench_report:large(100000),
    Directory = filename:join(Root, "many"),
    ok = file:make_dir(Directory),
    {ok, Key} = with_store(Root, disk, fun() ->
        erllama_cache_writer:save(?STORE, disk, meta(fresh()), <<0:(8 * 1024)>>)
    end),
    {ok, File} = file:read_file(filename:join(Root, file_name(Key))),
    [
        ok = prim_file:write_file(
            filename:join(Directory, file_name(<<N:256>>)), File)
     || N <- lists:seq(1, Files)
    ],
    Times = [
        begin
            true = garbage_collect(),
            Before = erlang:memory(total),
            Begun = erlang:monotonic_time(nanosecond),
            with_store(Directory, disk, fun() ->
                Time = erlang:monotonic_time(nanosecond) - Begun,
                #{files := Files} = erllama_cache_store:info(?STORE),
                {Time, (erlang:memory(total) - Before) / Files}
            end)
        end
     || _ <- lists:seq(1, 3)
    ],
    Time = bench_report:median([T || {T, _} <- Times]),
    {_, Each} = hd(Times),
    io:format("~nstart of a store on 100,000 files: ~.2f s, ~w bytes of memory a file~n",
              [Time / 1.0e9, round(Each)]),
    {
        [{start, Time / 1.0e9}],
        #{start_ns => Time, start_bytes_a_file => Each}
    }.
