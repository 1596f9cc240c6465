%% A fake of the host's counters. A writer has seven of them, in a text-keyed host eight, a reader
%% one (10), and neither has any business with the others.
-module(erllama_cache_counters).

-export([incr/1]).
-export([reset/0, add/1, all/0]).

-define(SLOTS, 32).
-define(IS_ANY_WRITERS(Slot),
        (Slot >= 4 andalso Slot =< 8 orelse Slot =:= 10 orelse Slot =:= 16 orelse Slot =:= 20)).
-if(defined(TEXT_KEYED) orelse defined(BOTH_KINDS)).
-define(IS_A_WRITERS(Slot), (?IS_ANY_WRITERS(Slot) orelse Slot =:= 22)).
-else.
-define(IS_A_WRITERS(Slot), ?IS_ANY_WRITERS(Slot)).
-endif.

-spec incr(pos_integer()) -> ok.
incr(Slot) when is_integer(Slot), ?IS_A_WRITERS(Slot) ->
    erllama_fake:call(incr, [Slot], fun() -> add(Slot) end).

%%% For tests. None of these is logged.

-spec reset() -> ok.
reset() ->
    persistent_term:put(?MODULE, counters:new(?SLOTS, [])).

%% For the host's other modules.
-spec add(pos_integer()) -> ok.
add(Slot) ->
    counters:add(persistent_term:get(?MODULE), Slot, 1).

%% The counters that are not zero.
-spec all() -> #{Slot :: pos_integer() => pos_integer()}.
all() ->
    Counters = persistent_term:get(?MODULE),
    maps:from_list([
        {Slot, Count}
     || Slot <- lists:seq(1, ?SLOTS), Count <- [counters:get(Counters, Slot)], Count > 0
    ]).
