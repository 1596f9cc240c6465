%% @doc Counts this node's saves and loads since its first writer or store started, and prints the
%% counts for Prometheus.
%%
%% A count is one atomic addition. Nothing here takes a lock or asks a process.
-module(erllama_cache_metrics).

-export([format/0, format/1]).
-export([setup/0, count/1, save_ended/4, read/0]).
-export_type([metrics/0, info/0, histogram/0]).

-type histogram() :: #{count := non_neg_integer(), sum_us := non_neg_integer(),
                       buckets := [{UpToUs :: pos_integer() | infinity, non_neg_integer()}]}.
%% How many observations, their sum in microseconds, and how many were at most so long: each bucket
%% counts those of the ones before it too.

-type metrics() :: #{
    saves := non_neg_integer(),
    saved_bytes := non_neg_integer(),
    save_errors := non_neg_integer(),
    refused := non_neg_integer(),
    adoptions := non_neg_integer(),
    replacements := non_neg_integer(),
    sync_failures := non_neg_integer(),
    save_time := histogram(),
    wait_time := histogram()
}.

-type info() :: #{
    limit := pos_integer(),
    current := non_neg_integer(),
    max_inflight_bytes := non_neg_integer() | infinity,
    inflight_bytes := non_neg_integer(),
    waiting := non_neg_integer(),
    granted := non_neg_integer(),
    timed_out := non_neg_integer(),
    owner_died := non_neg_integer(),
    waited := non_neg_integer(),
    longest_wait_us := non_neg_integer(),
    mean_wait_us := non_neg_integer(),
    saves := non_neg_integer(),
    saved_bytes := non_neg_integer(),
    save_errors := non_neg_integer(),
    refused := non_neg_integer(),
    adoptions := non_neg_integer(),
    replacements := non_neg_integer(),
    sync_failures := non_neg_integer(),
    save_time := histogram(),
    wait_time := histogram()
}.
%% What {@link erllama_cache_writer:info/0} returns: the semaphore and these metrics.

%% Every metric of the writer: its name, where its value comes from (`info', or a counter or a
%% histogram of this module), its type for Prometheus, and what it says. A metric more is one row
%% more, its field in `info()', and its line in docs/reference/metrics.md.
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
    {sync_failures, info, counter, "Syncs that the system has failed. The files were dropped."},
    {granted, info, counter, "Slots that were given."},
    {timed_out, info, counter, "Waits for a slot that ended without one."},
    {owner_died, info, counter, "Slots that came back by their owner's death."},
    {save_time, observed, histogram, "From the slot to the end of a save."},
    {wait_time, observed, histogram, "How long saves waited for their slots."}
]).
%% The same for a store, whose {@link erllama_cache_store:info/1} has all values.
-define(STORE_METRICS, [
    {files, gauge, "Files in the store."},
    {bytes, gauge, "Bytes of those."},
    {reservations, gauge, "Keys that are being saved."},
    {hits, counter, "Loads that found their key."},
    {misses, counter, "Loads that did not."},
    {refused, counter, "Loads that found a file that is corrupt or not of this node."},
    {duplicates, counter, "Saves of keys that were there."},
    {evictions, counter, "Files that made room for others."}
]).

%% Upper bounds in microseconds.
-define(BOUNDS, [100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000,
                 1000000, 2500000, 5000000, 10000000]).
%% A histogram takes a cell for each bound, one for what is above all, and one for the sum.
-define(HISTOGRAM_SIZE, 18).

%% @private
%% The cells, and for each metric of this module the place of its first one.
setup() ->
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

%% @private
-spec count(Counter :: atom()) -> ok.
count(Counter) ->
    count(Counter, 1).

%% @private
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

%% @private
-spec read() -> metrics().
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

%% @doc {@link format/1} of the writer alone.
%%
%% ```
%% Body = erllama_cache_metrics:format().
%% '''
-spec format() -> iodata().
format() ->
    format([]).

%% @doc All of the writer's figures and those of some stores in the
%% <a href="https://prometheus.io/docs/instrumenting/exposition_formats/">text format</a> of
%% Prometheus, version 0.0.4, for any HTTP handler to send as `text/plain; version=0.0.4'.
%%
%% It exits with `{noproc, _}' when the writer or one of the stores does not run.
%%
%% ```
%% Body = erllama_cache_metrics:format([my_store]).
%% '''
-spec format([erllama_cache_store:name()]) -> iodata().
format(Stores) ->
    Info = erllama_cache_writer:info(),
    Infos = [{Store, erllama_cache_store:info(Store)} || Store <- Stores],
    [
        [metric(Type, Name, Help, maps:get(Name, Info)) || {Name, _, Type, Help} <- ?METRICS],
        [store_metric(Type, Name, Help, Infos) || {Name, Type, Help} <- ?STORE_METRICS]
    ].

metric(histogram, Name, Help, Histogram) -> histogram(Name, Help, Histogram);
metric(Type, Name, Help, Value) -> rows(Type, atom_to_list(Name), Help, [{[], Value}]).

store_metric(_Type, _Name, _Help, []) ->
    [];
store_metric(Type, Name, Help, Infos) ->
    Rows = [{[{store, Store}], maps:get(Name, Info)} || {Store, Info} <- Infos],
    rows(Type, "store_" ++ atom_to_list(Name), Help, Rows).

%% The names of counters end in `_total'.
rows(gauge, Name, Help, Rows) -> rows(Name, <<"">>, <<"gauge">>, Help, Rows);
rows(counter, Name, Help, Rows) -> rows(Name, <<"_total">>, <<"counter">>, Help, Rows).

rows(Name, Suffix, Type, Help, Rows) ->
    Full = [full(Name), Suffix],
    [head(Full, Type, Help) | [[Full, labels(Labels), $\s, value(Value), $\n]
                               || {Labels, Value} <- Rows]].

head(Name, Type, Help) ->
    ["# HELP ", Name, $\s, Help, "\n# TYPE ", Name, $\s, Type, $\n].

%% Prometheus counts in seconds.
histogram(Name, Help, #{count := Count, sum_us := Sum, buckets := Buckets}) ->
    Full = [full(atom_to_list(Name)), "_seconds"],
    [
        head(Full, <<"histogram">>, Help),
        [
            [Full, "_bucket", labels([{le, bound(Bound)}]), $\s, value(N), $\n]
         || {Bound, N} <- Buckets
        ],
        [Full, "_sum ", seconds(Sum), $\n],
        [Full, "_count ", value(Count), $\n]
    ].

bound(infinity) -> "+Inf";
bound(Us) -> seconds(Us).

seconds(Us) ->
    float_to_list(Us / 1.0e6, [{decimals, 6}, compact]).

full(Name) -> ["erllama_cache_", Name].

labels([]) -> [];
labels([{Name, Value}]) -> [${, atom_to_list(Name), "=\"", escaped(Value), "\"}"].

escaped(Value) when is_atom(Value) -> escaped(atom_to_list(Value));
escaped(Value) -> unicode:characters_to_binary([escape(Char) || Char <- Value]).

escape($\\) -> "\\\\";
escape($") -> "\\\"";
escape($\n) -> "\\n";
escape(Char) -> Char.

value(Value) -> integer_to_list(Value).
