%% The stubs of the benchmarks' own NIF library. Where it is, is in the environment: it is no part
%% of the application.
-module(bench_nif).

-export([nothing/3]).

-on_load(load_library/0).

load_library() ->
    erlang:load_nif(os:getenv("BENCH_NIF"), 0).

-spec nothing(term(), term(), term()) -> ok.
nothing(_One, _Two, _Three) -> erlang:nif_error(nif_not_loaded).
