%% The counters and histograms of this node's saves, since its first writer or store started.
%%
%% A count is one atomic addition. Nothing here takes a lock or asks a process.
%%
%% @private
-module(erllama_cache_counts).

-export([setup/0, count/1, count/2, counting_raised/1, save_ended/4, read/0, metrics/0]).
-export_type([counts/0]).

-type counts() :: #{
    saves := non_neg_integer(),
    saved_bytes := non_neg_integer(),
    save_errors := non_neg_integer(),
    refused := non_neg_integer(),
    adoptions := non_neg_integer(),
    replacements := non_neg_integer(),
    dropped := non_neg_integer(),
    fetched := non_neg_integer(),
    fetched_bytes := non_neg_integer(),
    fetch_failures := non_neg_integer(),
    sync_failures := non_neg_integer(),
    save_time := erllama_cache_metrics:histogram(),
    wait_time := erllama_cache_metrics:histogram()
}.

%% Every metric of the writer: its name, where its value comes from (`info', or a counter or a
%% histogram of this module), its type for Prometheus, and what it says. A metric more is one row
%% more, its field in erllama_cache_metrics:info(), and its line in docs/reference/metrics.md.
-define(METRICS, [
    {limit, info, gauge, "Slots there are."},
    {current, info, gauge, "Slots that are held."},
    {waiting, info, gauge, "Processes that wait for a slot."},
    {inflight_bytes, info, gauge, "Bytes of payload that running saves hold."},
    {saves, counted, counter, "Saves that ended well, adoptions among them."},
    {saved_bytes, counted, counter, "Bytes of payload that those had."},
    {save_errors, counted, counter, "Saves that ended with an error, or raised."},
    {adoptions, counted, counter, "Saves that found a valid file of their key and left it."},
    {replacements, counted, counter, "Saves that replaced a file that was not valid."},
    {refused, counted, counter, "Saves and acquires that would not wait and found no slot free."},
    {pending, info, gauge, "Saves behind their callers that have not ended."},
    {pending_bytes, info, gauge, "Bytes of payload that those hold."},
    {oldest_pending_ms, info, gauge, "Milliseconds since the oldest of those began."},
    {dropped, counted, counter, "Saves behind their callers that failed after the answer."},
    {fetched, counted, counter, "Files that came from a peer into a tier of the host."},
    {fetched_bytes, counted, counter, "Bytes of those."},
    {fetch_failures, counted, counter, "Files that a peer had and that did not come whole."},
    {sync_failures, info, counter, "Syncs that the system has failed. The files were dropped."},
    {granted, info, counter, "Slots that were given."},
    {timed_out, info, counter, "Waits for a slot that ended without one."},
    {owner_died, info, counter, "Slots that came back by their owner's death."},
    {save_time, observed, histogram, "From the slot to the end of a save."},
    {wait_time, observed, histogram, "How long saves waited for their slots."}
]).
%% Upper bounds in microseconds.
-define(BOUNDS, [100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000,
                 1000000, 2500000, 5000000, 10000000]).
%% A histogram takes a cell for each bound, one for what is above all, and one for the sum.
-define(HISTOGRAM_SIZE, 18).

%% The cells, and for each metric of this module the place of its first one. And whether anybody
%% else counts.
setup() ->
    ok = erllama_cache_telemetry:setup(),
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            {Places, Size} = places(?METRICS, #{}, 1),
            Cells = counters:new(Size, [write_concurrency]),
            persistent_term:put(?MODULE, {Cells, Places});
        _Cells ->
            ok
    end.

places([{_, info, _, _} | Rows], Places, Next) ->
    places(Rows, Places, Next);
places([{Name, counted, _, _} | Rows], Places, Next) ->
    places(Rows, Places#{Name => Next}, Next + 1);
places([{Name, observed, _, _} | Rows], Places, Next) ->
    places(Rows, Places#{Name => Next}, Next + ?HISTOGRAM_SIZE);
places([], Places, Next) ->
    {Places, Next - 1}.

-spec count(Counter :: atom()) -> ok.
count(Counter) ->
    count(Counter, 1).

%% What a part of a save returns. One that raises is counted among the errors.
-spec counting_raised(fun(() -> Result)) -> Result.
counting_raised(Fun) ->
    try
        Fun()
    catch
        Class:Reason:Stack ->
            ok = count(save_errors),
            erlang:raise(Class, Reason, Stack)
    end.

%% Counts a save that had its slot. Times are in microseconds.
-spec save_ended({ok, erllama_cache_writer:key()} | {error, term()}, Bytes :: non_neg_integer(),
                 Waited :: non_neg_integer(), Took :: non_neg_integer()) -> ok.
save_ended(Result, Bytes, Waited, Took) ->
    ok = observe(wait_time, Waited),
    case Result of
        {ok, _Key} ->
            ok = count(saves),
            ok = count(saved_bytes, Bytes),
            observe(save_time, Took);
        {error, already_present} ->
            ok;
        {error, _} ->
            count(save_errors)
    end.

-spec count(Counter :: atom(), non_neg_integer()) -> ok.
count(Counter, N) ->
    {Cells, #{Counter := Place}} = persistent_term:get(?MODULE),
    counters:add(Cells, Place, N).

observe(Histogram, Us) ->
    {Cells, #{Histogram := Place}} = persistent_term:get(?MODULE),
    ok = counters:add(Cells, Place + bucket(Us, ?BOUNDS, 0), 1),
    counters:add(Cells, Place + ?HISTOGRAM_SIZE - 1, Us).

bucket(Us, [Bound | _], Index) when Us =< Bound -> Index;
bucket(Us, [_ | Bounds], Index) -> bucket(Us, Bounds, Index + 1);
bucket(_Us, [], Index) -> Index.

-spec read() -> counts().
read() ->
    {Cells, Places} = persistent_term:get(?MODULE),
    Own = [
        {Name, read(Source, Cells, maps:get(Name, Places))}
     || {Name, Source, _, _} <- ?METRICS, Source =/= info
    ],
    maps:from_list([{sync_failures, erllama_cache_nif:sync_failures()} | Own]).

read(counted, Cells, Place) ->
    counters:get(Cells, Place);
read(observed, Cells, Place) ->
    Bounds = ?BOUNDS ++ [infinity],
    Each = [counters:get(Cells, Place + N) || N <- lists:seq(0, length(Bounds) - 1)],
    {Sums, Count} = lists:mapfoldl(fun(N, Sum) -> {Sum + N, Sum + N} end, 0, Each),
    #{
        count => Count,
        sum_us => counters:get(Cells, Place + ?HISTOGRAM_SIZE - 1),
        buckets => lists:zip(Bounds, Sums)
    }.

%% All metrics of the writer, in the order in which they are printed.
-spec metrics() -> [{Name :: atom(), Source :: info | counted | observed,
                     Type :: gauge | counter | histogram, Help :: string()}].
metrics() -> ?METRICS.
