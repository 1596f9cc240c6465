%% The index of a store: a table of the store's name with one row for each key. Processes that load
%% and save read and write it directly, through this module alone.
%%
%% A row is a file or a reservation, as its state says. The token distinguishes a row from a later
%% one of the same key; a reservation that becomes a file keeps its token. Every change names the
%% token that it is about, and fails if another process was faster.
%%
%% Every function exits with `{noproc, _}' when there is no such table: the store has ended.
%%
%% @private
-module(erllama_cache_index).

-export([new/2, delete/1, config/1, find_config/1]).
-export([row/2, fold/3, count/1, sizes/1, oldest/2]).
-export([file/4, refused_file/4, reservation/4]).
-export([claimable/2]).
-export([add/2, claim/3, renew/3, settle/3, use/3, refuse/2, noted/4, remove/2, clear/1]).
-export([end_lease/2]).
-export_type([row/0, state/0]).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

%% A reservation stands for so many milliseconds without being renewed.
-define(LEASE, erllama_cache_host:lease()).

-type state() :: present | refused | reserved.
-type row() :: #row{}.

%% Makes the table, with the constant part of its store's state. `error' if the name is taken.
-spec new(erllama_cache_store:name(), term()) -> ok | error.
new(Name, Config) ->
    try
        Name = ets:new(Name, [
            named_table, public, {keypos, #row.key}, {read_concurrency, true},
            {write_concurrency, true}
        ]),
        true = ets:insert(Name, {config, config, Config}),
        ok
    catch
        error:badarg -> error
    end.

-spec delete(erllama_cache_store:name()) -> ok.
delete(Name) ->
    true = ets:delete(Name),
    ok.

-spec config(erllama_cache_store:name()) -> term().
config(Name) ->
    table(Name, fun() -> ets:lookup_element(Name, config, 3) end).

%% The same for a name that need not be a store's.
-spec find_config(atom()) -> {ok, term()} | error.
find_config(Name) ->
    try ets:lookup(Name, config) of
        [{config, config, Config}] -> {ok, Config};
        _ -> error
    catch
        error:badarg -> error
    end.

%% The table may be deleted at any moment, and its name taken by another store's.
table(Name, Fun) ->
    try
        Fun()
    catch
        error:badarg:Stack ->
            case ets:whereis(Name) of
                undefined -> exit({noproc, {erllama_cache_store, Name}});
                _ -> erlang:raise(error, badarg, Stack)
            end
    end.

%%% Reading

-spec row(erllama_cache_store:name(), erllama_cache_nif:key()) -> row() | none.
row(Name, Key) ->
    case table(Name, fun() -> ets:lookup(Name, Key) end) of
        [Row] -> Row;
        [] -> none
    end.

%% All rows, in no order.
-spec fold(erllama_cache_store:name(), fun((row(), Acc) -> Acc), Acc) -> Acc.
fold(Name, Fun, Acc) ->
    Rows = fun
        (#row{} = Row, Sofar) -> Fun(Row, Sofar);
        (_Config, Sofar) -> Sofar
    end,
    table(Name, fun() -> ets:foldl(Rows, Acc, Name) end).

%% How many files and reservations there are, and how many bytes the files have.
-spec count(erllama_cache_store:name()) ->
    {Files :: non_neg_integer(), Bytes :: non_neg_integer(), Reservations :: non_neg_integer()}.
count(Name) ->
    fold(Name, fun
        (#row{state = reserved}, {Files, Bytes, Reserved}) -> {Files, Bytes, Reserved + 1};
        (#row{size = Size}, {Files, Bytes, Reserved}) -> {Files + 1, Bytes + Size, Reserved}
    end, {0, 0, 0}).

%% The size of every file, by the token of its row.
-spec sizes(erllama_cache_store:name()) -> #{reference() => non_neg_integer()}.
sizes(Name) ->
    fold(Name, fun
        (#row{state = reserved}, Sizes) -> Sizes;
        (#row{token = Token, size = Size}, Sizes) -> Sizes#{Token => Size}
    end, #{}).

%% The least recently used files, with the time of their last use: a tenth of all, and at least
%% `Least'. So evicting all files reads each row only a few times.
-spec oldest(erllama_cache_store:name(), pos_integer()) ->
    [{LastUsed :: integer(), erllama_cache_nif:key()}].
oldest(Name, Least) ->
    Select = [
        {#row{key = '$2', last_used = '$1', state = State, _ = '_'}, [], [{{'$1', '$2'}}]}
     || State <- [present, refused]
    ],
    All = table(Name, fun() -> ets:select(Name, Select) end),
    lists:sublist(lists:sort(All), max(Least, length(All) div 10)).

%%% Rows

%% The row of a file.
-spec file(erllama_cache_nif:key(), pos_integer(), integer(), reference()) -> row().
file(Key, Size, LastUsed, Token) ->
    #row{key = Key, size = Size, last_used = not_ahead(LastUsed), state = present, token = Token}.

%% The row of a file that no load would accept.
-spec refused_file(erllama_cache_nif:key(), non_neg_integer(), integer(), reference()) -> row().
refused_file(Key, Size, LastUsed, Token) ->
    (file(Key, Size, LastUsed, Token))#row{state = refused}.

%% The row of a reservation of the calling process, whose file may take so many bytes.
-spec reservation(erllama_cache_nif:key(), non_neg_integer(), reference(), pid()) -> row().
reservation(Key, Size, Token, Pid) ->
    #row{key = Key, size = Size, state = reserved, token = Token, pid = Pid, expires = lease_end()}.

%% No checksum covers the time of last use in a file, and one in the future would keep it for ever.
not_ahead(LastUsed) ->
    min(LastUsed, erlang:system_time(millisecond)).

lease_end() ->
    erlang:monotonic_time(millisecond) + ?LEASE.

%%% Changing

%% Adds a row; `false' when there is one of its key.
-spec add(erllama_cache_store:name(), row()) -> boolean().
add(Name, Row) ->
    table(Name, fun() -> ets:insert_new(Name, Row) end).

%% What a new reservation may replace: nothing; the row of a file that is gone, or that no load
%% accepts; a reservation whose process is dead or whose lease has ended.
-spec claimable(erllama_cache_store:name(), erllama_cache_nif:key()) ->
    {ok, none | row()} | {error, conflict | already_present | term()}.
claimable(Name, Key) ->
    case row(Name, Key) of
        none -> {ok, none};
        #row{state = refused} = Row -> {ok, Row};
        #row{state = present} = Row -> present_still(Name, Row);
        #row{pid = Pid, expires = Expires} = Row ->
            Stands = Expires > erlang:monotonic_time(millisecond) andalso is_process_alive(Pid),
            case Stands of
                true -> {error, conflict};
                false -> {ok, Row}
            end
    end.

%% Another node, or a person, may have deleted the file. If the root cannot be read, the answer is
%% that error: nobody may take the key for stored.
present_still(Name, #row{key = Key} = Row) ->
    #config{path = Path} = config(Name),
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:exists(Turn, Path, Key) end) of
        true -> {error, already_present};
        false -> {ok, Row};
        {error, _} = Error -> Error
    end.

%% Puts a reservation in the place of `Old'; `false' when that row has changed since. A lease that
%% had ended may have been renewed.
-spec claim(erllama_cache_store:name(), Old :: row() | none, New :: row()) -> boolean().
claim(Name, none, New) ->
    add(Name, New);
claim(Name, #row{key = Key, token = Token, state = State, expires = Expires}, New) ->
    Old = #row{key = Key, token = Token, state = State, expires = Expires, _ = '_'},
    replace(Name, Old, New).

%% Renews a reservation's lease, if less is left of it than a running save needs.
-spec renew(erllama_cache_store:name(), erllama_cache_nif:key(), reference()) ->
    ok | {error, expired}.
renew(Name, Key, Token) ->
    Enough = erlang:monotonic_time(millisecond) + erllama_cache_host:lease_left(),
    case row(Name, Key) of
        #row{token = Token, state = reserved, expires = Expires} when Expires > Enough -> ok;
        #row{token = Token, state = reserved} = Row -> renew(Name, Row);
        _ -> {error, expired}
    end.

renew(Name, #row{key = Key, token = Token} = Row) ->
    Reserved = #row{key = Key, token = Token, state = reserved, _ = '_'},
    case replace(Name, Reserved, Row#row{expires = lease_end()}) of
        true -> ok;
        false -> {error, expired}
    end.

%% Turns a reservation into its file, even if its owner is dead or its lease has ended.
-spec settle(erllama_cache_store:name(), reference(), File :: row()) -> ok | {error, expired}.
settle(Name, Token, #row{key = Key} = File) ->
    Reserved = #row{key = Key, token = Token, state = reserved, _ = '_'},
    case replace(Name, Reserved, File) of
        true -> ok;
        false -> {error, expired}
    end.

replace(Name, Old, New) ->
    table(Name, fun() -> ets:select_replace(Name, [{Old, [], [{const, New}]}]) end) =:= 1.

%% Notes that the file of a key was used at this time, in milliseconds. Returns the uses since the
%% last note in the file, and that note's time; `false' when the key has no row. In a reservation's
%% row the note does no harm.
-spec use(erllama_cache_store:name(), erllama_cache_nif:key(), integer()) ->
    {Uses :: pos_integer(), Noted :: integer()} | false.
use(Name, Key, Now) ->
    Update = [{#row.uses, 1}, {#row.noted, 0}],
    table(Name, fun() ->
        ets:update_element(Name, Key, {#row.last_used, Now}) andalso
            try ets:update_counter(Name, Key, Update) of
                [Uses, Noted] -> {Uses, Noted}
            catch
                %% Evicted in between.
                error:badarg -> false
            end
    end).

%% So many uses have been noted in the file, at this time in seconds.
-spec noted(erllama_cache_store:name(), erllama_cache_nif:key(), pos_integer(), integer()) -> ok.
noted(Name, Key, Uses, Now) ->
    try ets:update_counter(Name, Key, {#row.uses, -Uses}) of
        _ ->
            _ = ets:update_element(Name, Key, {#row.noted, Now}),
            ok
    catch
        error:badarg -> ok
    end.

%% Marks the file of this row as refused by a load. It takes its room until it is replaced or
%% evicted, and a save of its key may replace it.
-spec refuse(erllama_cache_store:name(), row() | none) -> ok.
refuse(Name, #row{state = present, key = Key, token = Token} = Row) ->
    Present = #row{key = Key, token = Token, state = present, _ = '_'},
    _ = replace(Name, Present, Row#row{state = refused}),
    ok;
refuse(_Name, _NoFile) ->
    ok.

%% Removes a row, unless it has become another: one of another token, or a file where it was a
%% reservation.
-spec remove(erllama_cache_store:name(), row()) -> boolean().
remove(Name, #row{key = Key, token = Token, state = State}) ->
    States = case State of
        reserved -> [reserved];
        _ -> [present, refused]
    end,
    Match = [{#row{key = Key, token = Token, state = S, _ = '_'}, [], [true]} || S <- States],
    table(Name, fun() -> ets:select_delete(Name, Match) end) =:= 1.

%% Removes the rows of all files.
-spec clear(erllama_cache_store:name()) -> ok.
clear(Name) ->
    Match = [{#row{state = S, _ = '_'}, [], [true]} || S <- [present, refused]],
    _ = table(Name, fun() -> ets:select_delete(Name, Match) end),
    ok.

%% Ends the lease of a reservation, for tests that cannot wait for a minute.
-spec end_lease(erllama_cache_store:name(), erllama_cache_nif:key()) -> ok.
end_lease(Name, Key) ->
    true = ets:update_element(Name, Key, {#row.expires, erlang:monotonic_time(millisecond) - 1}),
    ok.
