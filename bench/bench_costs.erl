%% What a save costs beside its time, and what others notice of it: a part of `make bench-save'.
-module(bench_costs).

-export([processor/1, memory/1, long_calls/1, neighbours/1, start/1, stands_still/1]).

-import(bench_sides, [meta/1, fresh/0, side/4, once/1, remove/2, with_store/3]).
-import(bench_turns, [nanoseconds/1, file_name/1, payload/1, size_name/1, mib/1]).

-define(STORE, bench_store).

processor(Root) ->
    with_store(Root, disk, fun() ->
        Payload = payload(mib(256)),
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
        Rows = [{Bytes, peak(Root, Bytes)} || Bytes <- [mib(256), mib(1024)]],
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
        Payload = payload(mib(4096)),
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
        Payload = payload(mib(256)),
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
        Payload = payload(mib(256)),
        Times = [
            begin
                Meta = meta(fresh()),
                Begun = erlang:monotonic_time(nanosecond),
                {ok, Ref} = erllama_cache_writer:save_async(?STORE, disk, Meta, Payload),
                Time = erlang:monotonic_time(nanosecond) - Begun,
                receive {erllama_cache_writer, Ref, {ok, Key}} -> remove(Root, Key) end,
                Time
            end
         %% Of fewer than a hundred, the longest would be the 99th percentile.
         || _ <- lists:seq(1, bench_report:large(300))
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
