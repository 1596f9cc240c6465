%% @doc What this node's saves and loads have come to since its first writer or store started, and
%% the same as Prometheus reads it.
%%
%% A count is one atomic addition; nothing here takes a lock or asks a process.
-module(erllama_cache_metrics).

-export([format/0, format/1]).
-export([setup/0, count/1, count/2, observe/2, read/0]).
-export_type([metrics/0, histogram/0]).

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

-type counter() :: saves | saved_bytes | save_errors | adoptions | replacements | refused.

-define(COUNTERS, [
    {saves, "Saves that ended well, adoptions among them."},
    {saved_bytes, "Bytes of payload that those had."},
    {save_errors, "Saves that ended with an error, or raised."},
    {adoptions, "Saves that found a valid file of their key and left it."},
    {replacements, "Saves that replaced a file that was not valid."},
    {refused, "Saves and acquires that would not wait and found no slot free."}
]).
-define(HISTOGRAMS, [
    {save_time, "From the slot to the end of a save."},
    {wait_time, "How long saves waited for their slots."}
]).
%% Upper bounds in microseconds.
-define(BOUNDS, [100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000,
                 1000000, 2500000, 5000000, 10000000]).
%% A histogram takes a counter for each bound, one for what is above all, and one for the sum.
-define(HISTOGRAM_SIZE, 18).

%% @private
setup() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            Size = length(?COUNTERS) + length(?HISTOGRAMS) * ?HISTOGRAM_SIZE,
            persistent_term:put(?MODULE, counters:new(Size, [write_concurrency]));
        _Counters ->
            ok
    end.

%% @private
-spec count(counter()) -> ok.
count(Counter) ->
    count(Counter, 1).

%% @private
-spec count(counter(), non_neg_integer()) -> ok.
count(Counter, N) ->
    counters:add(persistent_term:get(?MODULE), counter_index(Counter), N).

counter_index(saves) -> 1;
counter_index(saved_bytes) -> 2;
counter_index(save_errors) -> 3;
counter_index(adoptions) -> 4;
counter_index(replacements) -> 5;
counter_index(refused) -> 6.

%% @private
-spec observe(save_time | wait_time, non_neg_integer()) -> ok.
observe(Histogram, Us) ->
    Counters = persistent_term:get(?MODULE),
    Base = histogram_base(Histogram),
    ok = counters:add(Counters, Base + bucket(Us, ?BOUNDS, 1), 1),
    counters:add(Counters, Base + ?HISTOGRAM_SIZE, Us).

histogram_base(save_time) -> length(?COUNTERS);
histogram_base(wait_time) -> length(?COUNTERS) + ?HISTOGRAM_SIZE.

bucket(Us, [Bound | _], Index) when Us =< Bound -> Index;
bucket(Us, [_ | Bounds], Index) -> bucket(Us, Bounds, Index + 1);
bucket(_Us, [], Index) -> Index.

%% @private
-spec read() -> metrics().
read() ->
    Counters = persistent_term:get(?MODULE),
    Counted = [{Name, counters:get(Counters, counter_index(Name))} || {Name, _} <- ?COUNTERS],
    Histograms = [{Name, histogram(Counters, histogram_base(Name))} || {Name, _} <- ?HISTOGRAMS],
    maps:from_list([{sync_failures, erllama_cache_nif:sync_failures()} | Counted ++ Histograms]).

histogram(Counters, Base) ->
    Bounds = ?BOUNDS ++ [infinity],
    Each = [counters:get(Counters, Base + N) || N <- lists:seq(1, length(Bounds))],
    {Sums, Count} = lists:mapfoldl(fun(N, Sum) -> {Sum + N, Sum + N} end, 0, Each),
    #{
        count => Count,
        sum_us => counters:get(Counters, Base + ?HISTOGRAM_SIZE),
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
    [
        [gauge(Name, Help, [{[], maps:get(Name, Info)}]) || {Name, Help} <- gauges()],
        [counter(Name, Help, [{[], maps:get(Name, Info)}]) || {Name, Help} <- counters()],
        [histogram(Name, Help, maps:get(Name, Info)) || {Name, Help} <- ?HISTOGRAMS],
        stores([{Store, erllama_cache_store:info(Store)} || Store <- Stores])
    ].

gauges() ->
    [
        {limit, "Slots there are."},
        {current, "Slots that are held."},
        {waiting, "Processes that wait for a slot."},
        {inflight_bytes, "Bytes of payload that running saves hold."}
    ].

counters() ->
    ?COUNTERS ++
        [
            {sync_failures, "Syncs that the system has failed. The files were dropped."},
            {granted, "Slots that were given."},
            {timed_out, "Waits for a slot that ended without one."},
            {owner_died, "Slots that came back by their owner's death."}
        ].

stores([]) ->
    [];
stores(Infos) ->
    Rows = fun(Name) -> [{[{store, Store}], maps:get(Name, Info)} || {Store, Info} <- Infos] end,
    [
        [gauge(["store_", atom_to_list(Name)], Help, Rows(Name)) || {Name, Help} <- [
            {files, "Files in the store."},
            {bytes, "Bytes of those."},
            {reservations, "Keys that are being saved."}
        ]],
        [counter(["store_", atom_to_list(Name)], Help, Rows(Name)) || {Name, Help} <- [
            {hits, "Loads that found their key."},
            {misses, "Loads that did not."},
            {refused, "Loads that found a file that is corrupt or not of this node."},
            {duplicates, "Saves of keys that were there."},
            {evictions, "Files that made room for others."}
        ]]
    ].

gauge(Name, Help, Rows) ->
    metric(name(Name), <<"gauge">>, Help, Rows).

%% Counters end in `_total'.
counter(Name, Help, Rows) ->
    metric([name(Name), "_total"], <<"counter">>, Help, Rows).

metric(Name, Type, Help, Rows) ->
    [head(Name, Type, Help) | [[Name, labels(Labels), $\s, value(Value), $\n]
                               || {Labels, Value} <- Rows]].

head(Name, Type, Help) ->
    ["# HELP ", Name, $\s, Help, "\n# TYPE ", Name, $\s, Type, $\n].

%% Prometheus counts in seconds.
histogram(Name, Help, #{count := Count, sum_us := Sum, buckets := Buckets}) ->
    Full = [name(Name), "_seconds"],
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

name(Name) when is_atom(Name) -> name(atom_to_list(Name));
name(Name) -> ["erllama_cache_", Name].

labels([]) -> [];
labels([{Name, Value}]) -> [${, atom_to_list(Name), "=\"", escaped(Value), "\"}"].

escaped(Value) when is_atom(Value) -> escaped(atom_to_list(Value));
escaped(Value) -> unicode:characters_to_binary([escape(Char) || Char <- Value]).

escape($\\) -> "\\\\";
escape($") -> "\\\"";
escape($\n) -> "\\n";
escape(Char) -> Char.

value(Value) -> integer_to_list(Value).
