%% The stubs of the benchmarks' own NIF library. Where it is, is in the environment: it is no part
%% of the application.
-module(bench_nif).

-export([nothing/3, name_syncs/1, floor_save/5, floor_load/2, table_crc32c/1]).

-on_load(load_library/0).

-type name_syncs() :: directory | file | both | none.

load_library() ->
    erlang:load_nif(os:getenv("BENCH_NIF"), 0).

-spec nothing(term(), term(), term()) -> ok.
nothing(_One, _Two, _Three) -> erlang:nif_error(nif_not_loaded).

%% What has to be synced after a link in this directory.
-spec name_syncs(Root :: binary()) -> name_syncs() | nil.
name_syncs(_Root) -> erlang:nif_error(nif_not_loaded).

%% Writes, syncs, links, syncs what has to be synced then.
-spec floor_save(Root :: binary(), Name :: binary(), Prefix :: binary(), Payload :: binary(),
                 name_syncs()) -> boolean().
floor_save(_Root, _Name, _Prefix, _Payload, _NameSyncs) -> erlang:nif_error(nif_not_loaded).

%% Everything from an offset on, in a new binary.
-spec floor_load(Path :: binary(), Offset :: non_neg_integer()) -> binary() | nil.
floor_load(_Path, _Offset) -> erlang:nif_error(nif_not_loaded).

-spec table_crc32c(binary()) -> 0..16#ffffffff.
table_crc32c(_Bytes) -> erlang:nif_error(nif_not_loaded).
