%% @doc Prints the counters and histograms of this node's writer and stores for Prometheus.
-module(erllama_cache_metrics).

-export([format/0, format/1]).
-export_type([info/0, histogram/0]).

-type histogram() :: #{count := non_neg_integer(), sum_us := non_neg_integer(),
                       buckets := [{UpToUs :: pos_integer() | infinity, non_neg_integer()}]}.
%% The number of observations, their sum in microseconds, and how many took at most so long. Each
%% bucket includes those before it.

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
    pending := non_neg_integer(),
    pending_bytes := non_neg_integer(),
    oldest_pending_ms := non_neg_integer(),
    dropped := non_neg_integer(),
    fetched := non_neg_integer(),
    fetched_bytes := non_neg_integer(),
    fetch_failures := non_neg_integer(),
    sync_failures := non_neg_integer(),
    save_time := histogram(),
    wait_time := histogram()
}.
%% What {@link erllama_cache_writer:info/0} returns: the state of the semaphore and the counts.

%% Every metric of a store: its name, its type and what it says. {@link erllama_cache_store:info/1}
%% has the values. The writer's metrics are in erllama_cache_counts.
-define(STORE_METRICS, [
    {files, gauge, "Files in the store."},
    {bytes, gauge, "Bytes of those."},
    {reservations, gauge, "Keys that are being saved."},
    {hits, counter, "Loads that found their key."},
    {misses, counter, "Loads that did not."},
    {refused, counter, "Loads that found a file that is corrupt or not of this node."},
    {duplicates, counter, "Saves of keys that were there."},
    {evictions, counter, "Files that made room for others."},
    {expired, counter, "Files that were not used for too long."},
    {rejected, counter, "Files whose state a model has refused."},
    {fetched, counter, "Files that came from a peer."},
    {fetched_bytes, counter, "Bytes of those."},
    {fetch_failures, counter, "Files that a peer had and that did not come, or not whole."}
]).

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
        [
            metric(Type, Name, Help, maps:get(Name, Info))
         || {Name, _Source, Type, Help} <- erllama_cache_counts:metrics()
        ],
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
