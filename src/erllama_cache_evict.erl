%% Eviction: which file of a bounded store goes next, and which have not been used for too long.
%%
%% The order is that of ranks, as of a look at all rows; a row that was used since that look is
%% passed over until the next one.
%%
%% The rank of a file is, for `lru', the time of its last use. For `frecency' each use counts 1, and
%% half as much each half-life later. The weights of two files change their order only when one is
%% used, so the rank need not change meanwhile: it is the time at which the weight will have come
%% down to 1, as Jesse Ruderman proposed it for the pages that a browser has visited
%% (wiki.mozilla.org/User:Jesse/NewFrecency).
%%
%% @private
-module(erllama_cache_evict).

-export([new/0, next/2, expired/1]).
-export([used/2, with_hits/3]).
-export_type([order/0, policy/0]).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

%% At least so many of the lowest ranks are remembered from one look at all of them.
-define(LOOK, 1000).
%% So many files that have expired are removed at a time.
-define(AT_A_TIME, 100).

-type policy() :: lru | {frecency, HalfLife :: pos_integer()}.
%% The half-life is in milliseconds.

-opaque order() :: [{erllama_cache_index:rank(), erllama_cache_nif:key()}].
%% The files to evict, the next one first, as of the last look.

%%% Ranks, in milliseconds of system time

%% The rank after a use at this time, or how to get it from the one before.
-spec used(policy(), Now :: integer()) ->
    erllama_cache_index:rank() | fun((erllama_cache_index:rank()) -> erllama_cache_index:rank()).
used(lru, Now) ->
    Now;
used({frecency, HalfLife}, Now) ->
    fun(Rank) -> later(HalfLife, weight(HalfLife, Rank, Now) + 1, Now) end.

%% The row of a file that says it has been used so often. When, it does not say: as if all were at
%% its last use.
-spec with_hits(policy(), Hits :: non_neg_integer(), erllama_cache_index:row()) ->
    erllama_cache_index:row().
with_hits(lru, _Hits, Row) ->
    Row;
with_hits({frecency, HalfLife}, Hits, #row{last_used = LastUsed} = Row) ->
    Row#row{rank = later(HalfLife, Hits + 1, LastUsed)}.

weight(HalfLife, Rank, Now) ->
    %% Of what was last used that long ago nothing is left, and a float would overflow.
    HalfLives = max(-1000, min(1000, (Rank - Now) / HalfLife)),
    math:pow(2, HalfLives).

later(HalfLife, Weight, Now) ->
    Now + HalfLife * math:log2(Weight).

%%% Eviction

%% No look has been taken yet.
-spec new() -> order().
new() -> [].

%% Removes the file of the lowest rank that can be removed, from the root and from the index, and
%% returns its row. `no_room': none can.
-spec next(#config{}, order()) -> {erllama_cache_index:row() | {error, no_room | term()}, order()}.
next(Config, Order) ->
    case first_removable(Config, Order) of
        none ->
            Now = erlang:system_time(millisecond),
            Look = erllama_cache_index:lowest(Config#config.name, ?LOOK),
            case first_removable(Config, Look) of
                none -> {{error, no_room}, []};
                {Evicted, Rest} -> {Evicted, still_lowest(Rest, Now)}
            end;
        Evicted ->
            Evicted
    end.

%% What is used or saved after the look ranks at that time or later. Of the others, which have been
%% used so often that their weight is above 1, none need be the next.
still_lowest(Rest, Look) ->
    lists:takewhile(fun({Rank, _}) -> Rank < Look end, Rest).

first_removable(_Config, []) ->
    none;
first_removable(#config{name = Name} = Config, [{Rank, Key} | Rest]) ->
    case erllama_cache_index:row(Name, Key) of
        #row{state = State, rank = Rank} = Row when State =/= reserved ->
            %% It may have been pinned since the look.
            case not erllama_cache_index:is_pinned(Name, Key) andalso remove(Row, Config) of
                evicted ->
                    {evicted(Row, Config, ?EVICTIONS), Rest};
                Kept when Kept =:= kept; Kept =:= false ->
                    first_removable(Config, Rest);
                %% No other file could be removed either.
                {error, _} = Error ->
                    {Error, Rest}
            end;
        _UsedSince ->
            first_removable(Config, Rest)
    end.

%% Removes files that were not used for the store's `ttl', and returns their rows: some at a time.
-spec expired(#config{}) -> {more | done, [erllama_cache_index:row()]}.
expired(#config{name = Name, ttl = Ttl} = Config) ->
    Since = erlang:system_time(millisecond) - Ttl,
    Rows = erllama_cache_index:unused_since(Name, {Since, ?AT_A_TIME}),
    Removed = [
        evicted(Row, Config, ?EXPIRED)
     || Row <- Rows,
        not is_used_elsewhere(Row, Since, Config),
        remove(Row, Config) =:= evicted
    ],
    %% What cannot be removed is tried again the next time only.
    Progress = case {length(Rows), Removed} of
        {?AT_A_TIME, [_ | _]} -> more;
        _ -> done
    end,
    {Progress, Removed}.

%% Another node on the same root may have noted a use in the file.
is_used_elsewhere(#row{key = Key}, Since, #config{name = Name, path = Path, secret = Secret}) ->
    Describe = fun(Turn) -> erllama_cache_nif:describe(Turn, Path, Key, Secret) end,
    case erllama_cache_io_limit:run(Describe) of
        {ok, #{last_used_time := Seconds}} when Seconds * 1000 > Since ->
            ok = erllama_cache_index:used_elsewhere(Name, Key, Seconds * 1000),
            true;
        _ ->
            false
    end.

evicted(Row, #config{name = Name, counters = Counters}, Counter) ->
    ok = counters:add(Counters, Counter, 1),
    ok = erllama_cache_telemetry:event(evict, stop, fun() ->
        {#{bytes => Row#row.size}, #{name => Name, key => Row#row.key}}
    end),
    Row.

remove(#row{key = Key} = Row, #config{name = Name, path = Path} = Config) ->
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:delete(Turn, Path, Key) end) of
        Existed when is_boolean(Existed) ->
            case erllama_cache_index:remove(Name, Row) of
                true -> evicted;
                false -> kept
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
