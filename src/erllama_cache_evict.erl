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

-export([new/0, next/2, until_next/1, overdue/1, expire/2]).
-export([used/2, with_hits/3]).
-export_type([order/0, policy/0]).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

%% At least so many of the lowest ranks are remembered from one look at all of them.
-define(LOOK, 1000).
%% So many files that have expired are removed at a time.
-define(AT_A_TIME, 100).
%% Milliseconds by which the clocks of two nodes may differ.
-define(AHEAD, 60000).

-type policy() :: lru | {frecency, HalfLife :: pos_integer()}.
%% The half-life is in milliseconds.

-opaque order() :: {Look :: integer(), [{erllama_cache_index:rank(), erllama_cache_nif:key()}]}.
%% The files to evict, the next one first, as of the last look, and its time.

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
new() -> {0, []}.

%% Removes the file of the lowest rank that can be removed, from the root and from the index, and
%% returns its row. `no_room': none can.
-spec next(#config{}, order()) -> {erllama_cache_index:row() | {error, no_room | term()}, order()}.
next(Config, {Look, Order}) ->
    case first_removable(Config, Order) of
        none ->
            Now = now_ms(),
            Lowest = erllama_cache_index:lowest(Config#config.name, ?LOOK),
            case first_removable(Config, Lowest) of
                none -> {{error, no_room}, new()};
                {Evicted, Rest} -> {Evicted, {Now, Rest}}
            end;
        {Evicted, Rest} ->
            {Evicted, {Look, Rest}}
    end.

%% What is used or saved after the look ranks at that time or later. Of the others, which have been
%% used so often that their weight is above 1, none need be the next when some time has passed.
-spec until_next(order()) -> order().
until_next({Look, Order}) ->
    {Look, lists:takewhile(fun({Rank, _}) -> Rank < Look end, Order)}.

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

%% Keys of the files that were not used for the store's `ttl'.
-spec overdue(#config{}) -> [erllama_cache_nif:key()].
overdue(#config{name = Name, ttl = Ttl}) ->
    erllama_cache_index:unused_since(Name, now_ms() - Ttl).

%% Removes some of these files, if they still have not been used, and returns their rows and the
%% keys of those that are left to be looked at.
-spec expire(#config{}, [erllama_cache_nif:key()]) ->
    {[erllama_cache_index:row()], [erllama_cache_nif:key()]}.
expire(Config, Keys) ->
    {Some, Others} = lists:split(min(?AT_A_TIME, length(Keys)), Keys),
    expire(Some, Others, Config, []).

expire([], Others, _Config, Removed) ->
    {Removed, Others};
expire([Key | Keys], Others, Config, Removed) ->
    case expire_one(Key, Config) of
        {expired, Row} -> expire(Keys, Others, Config, [Row | Removed]);
        kept -> expire(Keys, Others, Config, Removed);
        %% No other file could be removed either.
        {error, _} -> {Removed, []}
    end.

expire_one(Key, #config{name = Name, ttl = Ttl} = Config) ->
    Since = now_ms() - Ttl,
    case erllama_cache_index:row(Name, Key) of
        #row{state = State, last_used = LastUsed} = Row when
            State =/= reserved, LastUsed < Since
        ->
            IsInUse = erllama_cache_index:is_pinned(Name, Key) orelse
                is_used_elsewhere(Row, Since, Config),
            case IsInUse of
                true -> kept;
                false -> expire_row(Row, Config)
            end;
        _UsedSince ->
            kept
    end.

%% Under a reservation: a save of the key must not find its file gone that it has just published.
expire_row(#row{key = Key} = Row, #config{name = Name} = Config) ->
    Mine = erllama_cache_index:reservation(Key, 0, make_ref(), self()),
    case erllama_cache_index:claim(Name, Row, Mine) of
        true ->
            case remove(Mine, Config) of
                evicted ->
                    {expired, evicted(Row, Config, ?EXPIRED)};
                NotRemoved ->
                    _ = erllama_cache_index:settle(Name, Mine#row.token, Row),
                    NotRemoved
            end;
        false ->
            kept
    end.

%% Another node on the same root may have noted a use in the file. A time that is well ahead is of a
%% wrong clock, or damage: no checksum covers it.
is_used_elsewhere(#row{key = Key}, Since, #config{name = Name, path = Path, secret = Secret}) ->
    Describe = fun(Turn) -> erllama_cache_nif:describe(Turn, Path, Key, Secret) end,
    case erllama_cache_io_limit:run(Describe) of
        {ok, #{last_used_time := Seconds}} ->
            At = Seconds * 1000,
            IsUsed = At > Since andalso At =< now_ms() + ?AHEAD,
            ok = case IsUsed of
                true -> erllama_cache_index:used_elsewhere(Name, Key, At);
                false -> ok
            end,
            IsUsed;
        _ ->
            false
    end.

now_ms() ->
    erlang:system_time(millisecond).

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
