%% Shared by a store's API and its server. The rows are in erllama_cache_index.hrl.

-include("erllama_cache_peers.hrl").

%% The constant part of a store's state. The index has a copy, so that callers need not ask the
%% server.
-record(config, {
    name :: erllama_cache_store:name(),
    server :: pid(),
    path :: erllama_cache_nif:root(),
    root :: file:name_all(),
    tier :: erllama_cache_host:tier(),
    keyed_by :: erllama_cache_host:keyed_by(),
    max_bytes :: pos_integer() | infinity,
    min_free_bytes :: non_neg_integer(),
    %% Whether either bounds the store, so that the server alone adds and removes rows.
    bounded :: boolean(),
    eviction :: erllama_cache_evict:policy(),
    ttl :: pos_integer() | infinity,
    secret :: none | erllama_cache_nif:secret(),
    borrower :: none | #borrower{},
    counters :: counters:counters_ref(),
    %% Which directory the root was at the last scan: see root_generation/1 of the library. One
    %% number, written by the server.
    generation :: atomics:atomics_ref()
}).

%% Places in its counters.
-define(COUNTERS, [saves, duplicates, hits, misses, refused, evictions,
                   fetched, fetched_bytes, fetch_failures, expired, rejected]).
-define(SAVES, 1).
-define(DUPLICATES, 2).
-define(HITS, 3).
-define(MISSES, 4).
-define(REFUSED, 5).
-define(EVICTIONS, 6).
-define(FETCHED, 7).
-define(FETCHED_BYTES, 8).
-define(FETCH_FAILURES, 9).
-define(EXPIRED, 10).
-define(REJECTED, 11).
