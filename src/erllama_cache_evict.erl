%% Eviction: which file of a bounded store goes next.
%%
%% The order is by last use, as of a look at all rows; a row that was used since that look is passed
%% over until the next one.
%%
%% @private
-module(erllama_cache_evict).

-export([new/0, next/2]).
-export_type([order/0]).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

%% At least so many of the least recently used are remembered from one look at all of them.
-define(LOOK, 1000).

-opaque order() :: [{LastUsed :: integer(), erllama_cache_nif:key()}].
%% The files to evict, the next one first, as of the last look.

%% No look has been taken yet.
-spec new() -> order().
new() -> [].

%% Removes the least recently used file that can be removed, from the root and from the index, and
%% returns its row. `no_room': none can.
-spec next(#config{}, order()) -> {erllama_cache_index:row() | {error, no_room | term()}, order()}.
next(Config, Order) ->
    case first_removable(Config, Order) of
        none ->
            Look = erllama_cache_index:oldest(Config#config.name, ?LOOK),
            case first_removable(Config, Look) of
                none -> {{error, no_room}, []};
                Evicted -> Evicted
            end;
        Evicted ->
            Evicted
    end.

first_removable(_Config, []) ->
    none;
first_removable(#config{name = Name} = Config, [{LastUsed, Key} | Rest]) ->
    case erllama_cache_index:row(Name, Key) of
        #row{state = State, last_used = LastUsed} = Row when State =/= reserved ->
            case evict(Row, Config) of
                evicted -> {Row, Rest};
                kept -> first_removable(Config, Rest);
                %% No other file could be removed either.
                {error, _} = Error -> {Error, Rest}
            end;
        _UsedSince ->
            first_removable(Config, Rest)
    end.

evict(#row{key = Key} = Row, #config{name = Name, path = Path, counters = Counters} = Config) ->
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:delete(Turn, Path, Key) end) of
        Existed when is_boolean(Existed) ->
            case erllama_cache_index:remove(Name, Row) of
                true ->
                    ok = counters:add(Counters, ?EVICTIONS, 1),
                    ok = erllama_cache_telemetry:event(evict, stop, fun() ->
                        {#{bytes => Row#row.size}, #{name => Name, key => Key}}
                    end),
                    evicted;
                false ->
                    kept
            end;
        {error, Reason} ->
            ok = erllama_cache_store_log:skipped(Config, Key, Reason),
            case is_of_one_file(Reason) of
                true -> kept;
                false -> {error, Reason}
            end
    end.

%% Errors that concern this file alone; any other concerns the whole root.
is_of_one_file(eperm) -> true;
is_of_one_file(eisdir) -> true;
is_of_one_file(ebusy) -> true;
is_of_one_file(etxtbsy) -> true;
is_of_one_file(_) -> false.
