%% Stands in for the host's counters.
-module(erllama_cache_counters).
-export([incr/1]).

-spec incr(pos_integer()) -> ok.
incr(Slot) -> gen_server:call(?MODULE, {incr, Slot}).
