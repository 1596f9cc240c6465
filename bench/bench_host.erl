%% How a model's tokens come while its state is saved and loaded inside a host: `make bench-host'.
%% A host of each kind (bench_host_modules) has a model (bench_host_model) that makes a token with 5
%% ms of the processor's time. Its state is saved in turns by the original's way (plain_writer), by
%% this writer in line, and by this writer behind the caller; it is loaded by the tier server and
%% by the reader. What is saved has been made before, so no state is packed here. Files are in
%% $BENCH_DISK (see disk.sh). $BENCH_PARTS chooses parts by number, with commas.
-module(bench_host).

-export([main/0]).

-import(bench_turns, [order/2, in_turns/1, nanoseconds/1, file_name/1, payload/1]).

-define(KIB, 1024).
-define(MIB, 1048576).
-define(GIB, 1073741824).
-define(TIER, bench_tier).
-define(TOKEN_NS, 5000000).
-define(TOKENS, 2048).
%% The largest of the states is saved behind its model, too.
-define(SAVE_BYTES, ?GIB).
-define(WAYS, [original, in_line, behind]).
%% Milliseconds.
-define(FLUSH, 120000).
-define(EVERY, 250).
-define(MODELS, 4).

main() ->
    bench_report:main(host, fun run/0).

run() ->
    Work = bench_host_model:calibrate(?TOKEN_NS),
    Took = [nanoseconds(fun() -> bench_host_model:work(Work) end) || _ <- lists:seq(1, 200)],
    #{p50 := P50, p99 := P99} = bench_report:summary(Took),
    io:format("~na token's work: p50 ~.2f  p99 ~.2f ms~n", [P50 / 1.0e6, P99 / 1.0e6]),
    %% A quick run shows that it runs, by one of them.
    Wanted = lists:sublist([tokens, text], bench_report:rounds(3) - 1),
    Kinds = [{Kind, of_kind(Kind, Work)} || Kind <- Wanted],
    [{_, {Values, _}} | _] = Kinds,
    {_, {Others, _}} = lists:last(Kinds),
    {
        [{Id, worse(Id, Value, proplists:get_value(Id, Others))} || {Id, Value} <- Values],
        maps:from_list([{Kind, Figures} || {Kind, {_, Figures}} <- Kinds])
    }.

%% Both kinds must reach a bound.
worse(Id, One, Other) when Id =:= rate_256m; Id =:= rate_1g; Id =:= load_256m -> min(One, Other);
worse(_Id, One, Other) -> max(One, Other).

of_kind(Kind, Work) ->
    io:format("~n~n==== a host whose keys are made of ~ts~n", [Kind]),
    Parts = [
        fun(Root) -> gaps(Kind, Root, Work) end, fun(_) -> calls(Kind, Work) end,
        fun(Root) -> lost(Kind, Root) end, fun(_) -> loads(Kind) end,
        fun(_) -> small_loads(Kind) end, fun(Root) -> beside_a_load(Kind, Root) end
    ],
    Wanted = case os:getenv("BENCH_PARTS") of
        false -> lists:seq(1, length(Parts));
        Some -> [list_to_integer(N) || N <- string:lexemes(Some, ",")]
    end,
    Results = [bench_host_modules:with_host(Kind, ?TIER, lists:nth(N, Parts)) || N <- Wanted],
    {Values, Figures} = lists:unzip(Results),
    {lists:append(Values), lists:foldl(fun maps:merge/2, #{}, Figures)}.

%%% Ways to save: how the caller saves, and how it learns that all is on the disk.

with_way(original, #{limit := Limit}, Fun) ->
    {ok, Semaphore} = plain_semaphore:start_link(Limit),
    try
        Fun(fun(Meta, Payload) -> plain_writer:save(Meta, Payload, 0) end, fun() -> ok end)
    after
        gen_server:stop(Semaphore)
    end;
with_way(in_line, #{limit := Limit}, Fun) ->
    with_writer(#{max_concurrent => Limit}, fun() -> Fun(fun save/2, fun() -> ok end) end);
with_way(behind, #{limit := Limit} = Options, Fun) ->
    Behind = maps:merge(#{save_bytes => ?SAVE_BYTES}, maps:with([max_bytes], Options)),
    with_writer(#{max_concurrent => Limit, write_behind => Behind}, fun() ->
        Fun(fun save/2, fun() -> erllama_cache_writer:flush(?FLUSH) end)
    end).

with_writer(Config, Fun) ->
    {ok, Writer} = erllama_cache_writer:start_link(Config),
    try Fun() after gen_server:stop(Writer, normal, infinity) end.

%% As a host's model calls it.
save(Meta, Payload) ->
    erllama_cache_writer:save(?TIER, disk, Meta, Payload, 0).

%% The limit that a writer has by itself.
usual_limit() ->
    #{limit => erlang:system_info(schedulers) * 2 + 1}.

%% Never the same twice. A host whose keys are made of text gives the text: four bytes a token.
meta(Kind, Tokens) ->
    Meta = #{
        save_reason => continued, quant_bits => 16, quant_type => f16,
        fingerprint => <<(erlang:unique_integer([positive])):256>>, fingerprint_mode => safe,
        ctx_params_hash => <<2:256>>, context_size => 4096, tokens => lists:seq(1, Tokens)
    },
    case Kind of
        tokens -> Meta;
        text -> Meta#{prompt_text => binary:copy(<<"word">>, Tokens)}
    end.

remove(Root, Keys) ->
    [ok = file:delete(filename:join(Root, file_name(Key))) || Key <- Keys],
    ok.

%%% Gaps between tokens

%% Bytes, rounds, and rounds of the original's way, which is slow and does not vary.
sizes() ->
    [{16 * ?MIB, rounds(), 5}, {256 * ?MIB, rounds(), 3}, {?GIB, min(3, rounds()), 1}].

%% Two in a quick run.
rounds() ->
    min(5, bench_report:large(32)).

%% After which tokens the state is saved, and how many are made at least.
saves_at() ->
    case bench_report:large(16) of
        16 -> {[100, 200], 300};
        _ -> {[20, 40], 60}
    end.

gaps(Kind, Root, Work) ->
    %% Everything once, and as much memory as is used: what a virtual machine touches for the first
    %% time its host has to give it.
    _ = gap_streams(Kind, Root, Work, ?MIB, 1, 1),
    Largest = payload(bench_report:large(?GIB)),
    _ = gap_stream(behind, Kind, Root, Work, [Largest, Largest]),
    io:format("~ngaps between tokens (milliseconds: the longest at each save, above the usual, p50 "
              "and max;~n  save/5; until it is on the disk; tokens per second meanwhile, of the "
              "usual)~n"),
    Streams = [
        {Bytes, gap_streams(Kind, Root, Work, bench_report:large(Bytes), Rounds, Originals)}
     || {Bytes, Rounds, Originals} <- sizes()
    ],
    Rows = [{Bytes, gap_row(Of)} || {Bytes, Of} <- Streams],
    [say_gaps(Bytes, Row) || {Bytes, Row} <- Rows],
    %% The last one of each way.
    Timelines = maps:from_list([
        {Way, bench_host_model:gaps(Stamps)}
     || {Way, #{stamps := Stamps}} <- proplists:get_value(256 * ?MIB, Streams), Way =/= none
    ]),
    [#{behind := Behind}, #{behind := Large}] =
        [proplists:get_value(Bytes, Rows) || Bytes <- [256 * ?MIB, ?GIB]],
    {
        [{gap_256m, above_ms(Behind)}, {gap_1g, above_ms(Large)},
         {rate_256m, rate(Behind)}, {rate_1g, rate(Large)}],
        #{gaps => maps:from_list(Rows), timeline_ns => Timelines}
    }.

above_ms(#{above_ns := #{p50 := P50}}) -> P50 / 1.0e6.

rate(#{rate_percent := #{p50 := P50}}) -> P50.

%% All streams of a size, in the order in which they were made.
gap_streams(Kind, Root, Work, Bytes, Rounds, Originals) ->
    Payloads = [payload(Bytes), payload(Bytes)],
    [
        {Way, gap_stream(Way, Kind, Root, Work, Payloads)}
     || Round <- lists:seq(1, Rounds), Way <- order(Round, [none | ?WAYS]),
        Way =/= original orelse Round =< Originals
    ].

%% One stream of tokens with its saves, or without any: then as long as one with large saves.
gap_stream(none, _Kind, _Root, Work, [Payload | _]) ->
    {_, Tokens} = saves_at(),
    Longer = 1 + 3 * byte_size(Payload) div ?GIB,
    bench_host_model:run(Work, Tokens * Longer, #{}, fun() -> ok end);
gap_stream(Way, Kind, Root, Work, Payloads) ->
    {At, Tokens} = saves_at(),
    with_way(Way, usual_limit(), fun(Save, Flush) ->
        Saves = maps:from_list([
            {Token, fun() -> Save(Meta, Payload) end}
         || {Token, Payload} <- lists:zip(At, Payloads), Meta <- [meta(Kind, ?TOKENS)]
        ]),
        #{saves := Saved} = Stream = bench_host_model:run(Work, Tokens, Saves, Flush),
        remove(Root, [Key || #{result := {ok, Key}} <- Saved]),
        %% None was lost, or there is nothing to show.
        [] = [Result || #{result := {error, _} = Result} <- Saved],
        Stream
    end).

gap_row(Streams) ->
    Of = fun(Wanted) -> [Stream || {Way, Stream} <- Streams, Way =:= Wanted] end,
    Gaps = lists:append([bench_host_model:gaps(Stamps) || #{stamps := Stamps} <- Of(none)]),
    #{p50 := Usual} = Summary = bench_report:summary(Gaps),
    Mean = lists:sum(Gaps) / length(Gaps),
    Ways = [{Way, at_saves(Of(Way), Usual, Mean)} || Way <- ?WAYS],
    #{tokens := #{p50 := Meanwhile}} = proplists:get_value(behind, Ways),
    Alone = [
        lists:max(Window) - Usual
     || #{stamps := Stamps} <- Of(none),
        Window <- windows(bench_host_model:gaps(Stamps), Meanwhile)
    ],
    maps:from_list([{usual_ns, Summary}, {alone_ns, bench_report:summary(Alone)} | Ways]).

%% As many gaps as a save behind its caller lasts, and again: what they are where nothing is saved.
windows(Gaps, Length) ->
    Starts = lists:seq(1, max(1, length(Gaps) - Length + 1), Length),
    [lists:sublist(Gaps, Start, Length) || Start <- Starts].

at_saves(Streams, Usual, Mean) ->
    Each = [
        {bench_host_model:at_save(Save, Stamps), Save}
     || #{stamps := Stamps, saves := Saves} <- Streams, Save <- Saves
    ],
    Summary = fun(Of) -> bench_report:summary([Of(Gaps, Save) || {Gaps, Save} <- Each]) end,
    #{
        above_ns => Summary(fun(Gaps, _) -> lists:max(Gaps) - Usual end),
        tokens => Summary(fun(Gaps, _) -> length(Gaps) end),
        call_ns => Summary(fun(_, #{begun := Begun, ended := Ended}) -> Ended - Begun end),
        saved_ns => Summary(fun(_, #{begun := Begun, flushed := At}) -> At - Begun end),
        rate_percent => Summary(fun(Gaps, _) -> 100 * Mean * length(Gaps) / lists:sum(Gaps) end)
    }.

say_gaps(Bytes, #{usual_ns := #{p50 := Usual, p99 := P99, max := Longest},
                  alone_ns := #{p50 := Alone}} = Row) ->
    io:format("  ~8ts   none      usual ~.2f  p99 ~.2f  max ~.2f  in as many tokens ~.3f~n",
              [size_name(Bytes), Usual / 1.0e6, P99 / 1.0e6, Longest / 1.0e6, Alone / 1.0e6]),
    [
        begin
            #{Way := #{above_ns := #{p50 := P50, max := Max}, call_ns := #{p50 := Call},
                       saved_ns := #{p50 := Saved}, rate_percent := #{p50 := Rate}}} = Row,
            io:format("             ~-8ts  ~9.3f ~9.3f   ~9.3f   ~9.3f   ~5.1f %~n",
                      [Way, P50 / 1.0e6, Max / 1.0e6, Call / 1.0e6, Saved / 1.0e6, Rate])
        end
     || Way <- ?WAYS
    ].

size_name(?GIB) -> "1 GiB";
size_name(Bytes) -> integer_to_list(Bytes div ?MIB) ++ " MiB".

%%% How long save/5 itself takes

calls(Kind, Work) ->
    Payload = payload(4 * ?KIB),
    Rows = [{Tokens, call_rounds(Kind, Work, Tokens, Payload)} || Tokens <- [?TOKENS, 30000]],
    io:format("~nsave/5 with 4 KiB, after each token (microseconds: p50, p99, max)~n"),
    [
        io:format("  ~5w tokens   ~-8ts ~9.1f ~9.1f ~9.1f~n",
                  [Tokens, Way, P50 / 1.0e3, P99 / 1.0e3, Max / 1.0e3])
     || {Tokens, Row} <- Rows, Way <- ?WAYS,
        #{p50 := P50, p99 := P99, max := Max} <- [map_get(Way, Row)]
    ],
    [Few, Many] = [P99 || {_, #{behind := #{p99 := P99}}} <- Rows],
    {[{call_2k, Few / 1.0e3}, {call_30k, Many / 1.0e3}], #{calls_ns => maps:from_list(Rows)}}.

call_rounds(Kind, Work, Tokens, Payload) ->
    Rounds = [
        {Way, with_way(Way, usual_limit(), fun(Save, Flush) ->
            timed_calls(Kind, Work, Tokens, Payload, Save, Flush)
        end)}
     || Round <- lists:seq(1, rounds()), Way <- order(Round, ?WAYS)
    ],
    maps:from_list([
        {Way, bench_report:summary(lists:append([Times || {Of, Times} <- Rounds, Of =:= Way]))}
     || Way <- ?WAYS
    ]).

%% In a process of its own, which has the tokens on its heap and nothing else. The first ones warm
%% it up.
timed_calls(Kind, Work, Tokens, Payload, Save, Flush) ->
    Timed = spawn_monitor(fun() ->
        Meta = meta(Kind, Tokens),
        Times = [
            begin
                _ = bench_host_model:work(Work),
                Another = Meta#{fingerprint := <<(erlang:unique_integer([positive])):256>>},
                Time = nanoseconds(fun() -> {ok, _} = Save(Another, Payload) end),
                ok = Flush(),
                Time
            end
         || _ <- lists:seq(1, 10 + bench_report:large(200))
        ],
        exit({took, lists:nthtail(10, Times)})
    end),
    took(Timed).

%%% Saves that are lost

%% Models whose work is not the processor's: they only save, all at the same moments, or at once
%% when the save before took longer than that.
lost(Kind, Root) ->
    Each = bench_report:large(200) div ?MODELS,
    Payloads = [payload(bench_report:large(64) * ?MIB) || _ <- lists:seq(1, ?MODELS)],
    Lost = [
        {Way, with_way(Way, #{limit => 2, max_bytes => ?GIB}, fun(Save, Flush) ->
            ?MODELS * Each - length(saved(Kind, Root, Each, Payloads, Save, Flush))
        end)}
     || Way <- ?WAYS
    ],
    io:format("~nsaves of 64 MiB that are lost, of ~w: ~ts~n", [?MODELS * Each, lists:join(", ", [
        io_lib:format("~ts ~w", [Way, Count]) || {Way, Count} <- Lost
    ])]),
    {
        [{lost, proplists:get_value(behind, Lost)}],
        #{lost => maps:from_list(Lost), lost_of => ?MODELS * Each}
    }.

%% The keys that have been announced. Their files are evicted as soon as that is so: together they
%% would not fit.
saved(Kind, Root, Each, Payloads, Save, Flush) ->
    Before = plain_writer:announced(),
    Evictor = spawn_link(fun() -> evict(Root, Before) end),
    Begin = erlang:monotonic_time(millisecond) + ?EVERY,
    Models = [
        spawn_monitor(fun() ->
            [
                begin
                    Meta = meta(Kind, ?TOKENS),
                    timer:sleep(max(0, Begin + N * ?EVERY - erlang:monotonic_time(millisecond))),
                    Save(Meta, Payload)
                end
             || N <- lists:seq(1, Each)
            ]
        end)
     || Payload <- Payloads
    ],
    [receive {'DOWN', Monitor, process, Pid, Why} -> normal = Why end || {Pid, Monitor} <- Models],
    ok = Flush(),
    Evictor ! {stop, self()},
    receive {Evictor, Evicted} -> Evicted -- Before end.

evict(Root, Evicted) ->
    Announced = plain_writer:announced(),
    ok = remove(Root, Announced -- Evicted),
    receive
        {stop, Pid} ->
            Last = plain_writer:announced(),
            ok = remove(Root, Last -- Announced),
            Pid ! {self(), Last}
    after 20 ->
        evict(Root, Announced)
    end.

%%% Loads, warm

loads(Kind) ->
    Bytes = bench_report:large(256) * ?MIB,
    with_writer(#{}, fun() ->
        Sides = load_sides(stored(Kind, Bytes), Bytes),
        _ = in_turns(Sides),
        Times = lists:append([in_turns(order(Round, Sides)) || Round <- lists:seq(1, rounds())]),
        Row = load_summaries(Times),
        say_loads("load of 256 MiB, warm", Row),
        #{tier := #{p50 := Tier}, reader := #{p50 := Reader}} = Row,
        {[{load_256m, Tier / Reader}], #{load_256m_ns => Row}}
    end).

stored(Kind, Bytes) ->
    {ok, Key} = save(meta(Kind, ?TOKENS), payload(Bytes)),
    Key.

load_sides(Key, Bytes) ->
    [{Side, fun() -> ok = load(Side, Key, Bytes) end} || Side <- [tier, reader]].

load(Side, Key, Bytes) ->
    {ok, _, Payload} = case Side of
        tier -> erllama_cache_disk_srv:load(?TIER, Key);
        reader -> erllama_cache_reader:load(?TIER, Key)
    end,
    Bytes = byte_size(Payload),
    ok.

load_summaries(Times) ->
    maps:from_list([
        {Side, bench_report:summary([Time || {Of, Time} <- Times, Of =:= Side])}
     || Side <- [tier, reader]
    ]).

say_loads(What, Row) ->
    io:format("~n~ts (milliseconds: p50, p99, max)~n", [What]),
    [
        io:format("  ~-8ts ~9.3f ~9.3f ~9.3f   ~w loads~n",
                  [Side, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6, N])
     || Side <- [tier, reader],
        #{p50 := P50, p99 := P99, max := Max, n := N} <- [map_get(Side, Row)]
    ].

%% What a load of 4 KiB takes while four processes load 256 MiB each, over and over.
small_loads(Kind) ->
    Bytes = bench_report:large(256) * ?MIB,
    with_writer(#{}, fun() ->
        Large = stored(Kind, Bytes),
        Small = stored(Kind, 4 * ?KIB),
        Row = load_summaries(lists:append([
            beside_loads(fun() -> load(Side, Large, Bytes) end, Count, Side, Small)
         || {Side, Count} <- [{tier, 5}, {reader, 1000}]
        ])),
        say_loads("load of 4 KiB, beside four of 256 MiB", Row),
        #{reader := #{p99 := P99}} = Row,
        {[{load_4k, P99 / 1.0e6}], #{load_4k_ns => Row}}
    end).

beside_loads(Load, Count, Side, Small) ->
    Loaders = [spawn_monitor(fun() -> again(Load) end) || _ <- lists:seq(1, 4)],
    Times = [
        begin
            timer:sleep(2),
            {Side, nanoseconds(fun() -> ok = load(Side, Small, 4 * ?KIB) end)}
        end
     || _ <- lists:seq(1, max(3, bench_report:large(Count)))
    ],
    [Pid ! stop || {Pid, _} <- Loaders],
    [receive {'DOWN', Monitor, process, Pid, Why} -> normal = Why end || {Pid, Monitor} <- Loaders],
    Times.

again(Load) ->
    receive
        stop -> ok
    after 0 ->
        [{load, _}] = in_turns([{load, Load}]),
        again(Load)
    end.

%%% A save while the tier server loads 2 GiB

beside_a_load(Kind, Root) ->
    Bytes = bench_report:large(2048) * ?MIB,
    Sizes = [4 * ?KIB, 16 * ?MIB],
    with_writer(#{}, fun() ->
        Rows = [{Size, beside_a_load(Kind, Root, Bytes, payload(Size))} || Size <- Sizes],
        io:format("~nsave beside a load of 2 GiB in the tier server (milliseconds: p50, p99)~n"),
        [
            io:format("  ~8ts   alone ~9.3f ~9.3f   beside ~9.3f ~9.3f, ~w of ~w failed   "
                      "the root's answer after ~.1f ms~n",
                      [case Size of 4096 -> "4 KiB"; _ -> size_name(Size) end,
                       A50 / 1.0e6, A99 / 1.0e6, B50 / 1.0e6, B99 / 1.0e6, Failed, N,
                       Asked / 1.0e6])
         || {Size, #{alone_ns := #{p50 := A50, p99 := A99}, failed := Failed, root_ns := Asked,
                     beside_ns := #{p50 := B50, p99 := B99, n := N}}} <- Rows
        ],
        {_, #{alone_ns := #{p50 := Alone}, beside_ns := #{p50 := Beside}}} = hd(Rows),
        {[{beside_load, Beside / Alone}], #{beside_load => maps:from_list(Rows)}}
    end).

beside_a_load(Kind, Root, Bytes, Payload) ->
    Key = hollow(Kind, Root, Bytes),
    Meta = meta(Kind, ?TOKENS),
    Before = some_saves(Meta, Root, Payload, 100),
    Loader = spawn_monitor(fun() -> {error, crc} = erllama_cache_disk_srv:load(?TIER, Key) end),
    Asker = spawn_monitor(fun() -> exit({took, nanoseconds(fun ask_for_the_root/0)}) end),
    Beside = saves_until(Loader, Meta, Root, Payload, []),
    {Alone, _} = lists:unzip(Before ++ some_saves(Meta, Root, Payload, 100)),
    {Meanwhile, Results} = lists:unzip(Beside),
    #{
        alone_ns => bench_report:summary(Alone), beside_ns => bench_report:summary(Meanwhile),
        failed => length([error || error <- Results]), root_ns => took(Asker)
    }.

%% What the original's save waits for, in its fourth step: five seconds at most, and then it exits.
ask_for_the_root() ->
    try
        erllama_cache_disk_srv:dir(?TIER)
    catch
        exit:{timeout, _} -> none
    end.

took({Pid, Monitor}) ->
    receive {'DOWN', Monitor, process, Pid, {took, Time}} -> Time end.

some_saves(Meta, Root, Payload, Count) ->
    [one_save(Meta, Root, Payload) || _ <- lists:seq(1, Count)].

saves_until({Pid, Monitor} = Loader, Meta, Root, Payload, Saves) ->
    receive
        {'DOWN', Monitor, process, Pid, Why} ->
            normal = Why,
            Saves
    after 0 ->
        saves_until(Loader, Meta, Root, Payload, [one_save(Meta, Root, Payload) | Saves])
    end.

one_save(Meta, Root, Payload) ->
    Another = Meta#{fingerprint := <<(erlang:unique_integer([positive])):256>>},
    timer:sleep(2),
    Begun = erlang:monotonic_time(nanosecond),
    Result = save(Another, Payload),
    Time = erlang:monotonic_time(nanosecond) - Begun,
    case Result of
        {ok, Key} -> remove(Root, [Key]), {Time, ok};
        {error, _} -> {Time, error}
    end.

%% A file of so many bytes of payload that takes no room: they are a hole. So its checksum is wrong,
%% which the tier server knows when it has summed them all.
hollow(Kind, Root, Bytes) ->
    Key = stored(Kind, 4 * ?KIB),
    Path = filename:join(Root, file_name(Key)),
    {ok, <<Start:40/binary, _:64, Offset:64/little, _:64, Rest/binary>>} = file:read_file(Path),
    Prefix = binary:part(Rest, 0, Offset - byte_size(Start) - 24),
    {ok, File} = file:open(Path, [write, raw, binary]),
    ok = file:write(File, [Start, <<Bytes:64/little, Offset:64/little, Bytes:64/little>>, Prefix]),
    {ok, _} = file:position(File, Offset + Bytes),
    ok = file:truncate(File),
    ok = file:close(File),
    Key.
