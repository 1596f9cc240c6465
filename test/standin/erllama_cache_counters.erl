%% Stands in for the host's counters.
-module(erllama_cache_counters).

-export([incr/1]).
-export([reset/0, all/0]).

-define(SLOTS, 32).

-spec incr(pos_integer()) -> ok.
incr(Slot) ->
    erllama_standin:call(incr, [Slot], fun() ->
        counters:add(persistent_term:get(?MODULE), Slot, 1)
    end).

-spec reset() -> ok.
reset() ->
    persistent_term:put(?MODULE, counters:new(?SLOTS, [])).

%% The counters that are not zero.
-spec all() -> #{Slot :: pos_integer() => pos_integer()}.
all() ->
    Counters = persistent_term:get(?MODULE),
    maps:from_list([
        {Slot, Count}
     || Slot <- lists:seq(1, ?SLOTS), Count <- [counters:get(Counters, Slot)], Count > 0
    ]).
