%% The index of a store: a table of the store's name with one row for each key. Processes that load
%% and save read and write it directly, through this module alone.
%%
%% A row is a file or a reservation, as its state says. The token distinguishes a row from a later
%% one of the same key; a reservation that becomes a file keeps its token. Every change names the
%% token that it is about, and fails if another process was faster.
%%
%% A second table counts the files that a load may accept by their lengths, for those who look for
%% the longest stored prefix.
%%
%% Every function exits with `{noproc, _}' when there is no such table: the store has ended.
%%
%% @private
-module(erllama_cache_index).

-export([new/2, delete/1, config/1, find_config/1]).
-export([row/2, fold/3, count/1, sizes/1, lowest/2, unused_since/2, lengths/3, length_counts/1]).
-export([file/5, refused_file/4, reservation/4]).
-export([claimable/2]).
-export([add/2, claim/3, renew/3, settle/3, use/4, used_elsewhere/3, noted/4]).
-export([pin/2, unpin/2, is_pinned/2, pinned/1]).
-export([refuse/2, accept/3, remove/2, clear/1]).
-export([end_lease/2]).
-export_type([row/0, state/0, rank/0]).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

%% A reservation stands for so many milliseconds without being renewed.
-define(LEASE, erllama_cache_host:lease()).

-type state() :: present | refused | reserved.
-type row() :: #row{}.
-type rank() :: number().
%% Of a file: the one of the lowest rank is evicted first.

%% Makes the tables, with the constant part of their store's state. `error' if the name is taken.
-spec new(erllama_cache_store:name(), term()) -> ok | error.
new(Name, Config) ->
    Lengths = ets:new(lengths, [
        ordered_set, public, {read_concurrency, true}, {write_concurrency, true}
    ]),
    try
        Name = ets:new(Name, [
            named_table, public, {keypos, #row.key}, {read_concurrency, true},
            {write_concurrency, true}
        ]),
        Tables = {ets:whereis(Name), Lengths},
        true = ets:insert(Name, [{config, config, Config}, {tables, tables, Tables}]),
        ok
    catch
        error:badarg ->
            true = ets:delete(Lengths),
            error
    end.

-spec delete(erllama_cache_store:name()) -> ok.
delete(Name) ->
    {Rows, Lengths} = tables(Name),
    true = ets:delete(Rows),
    true = ets:delete(Lengths),
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

%% The table may be deleted at any moment, and its name taken by another store's, which is not there
%% before it has all that new/2 inserts.
table(Name, Fun) ->
    try
        Fun()
    catch
        error:badarg ->
            case find_config(Name) of
                %% Another store's by now, or a mistake, which is raised again.
                {ok, _} -> Fun();
                error -> no_store(Name)
            end
    end.

-spec no_store(erllama_cache_store:name()) -> no_return().
no_store(Name) ->
    exit({noproc, {erllama_cache_store, Name}}).

%% Rows and lengths of one store. What belongs to both has to be written through these: between two
%% uses of the name it may have become the name of another store's table.
tables(Name) ->
    table(Name, fun() -> ets:lookup_element(Name, tables, 3) end).

in_tables(Name, Fun) ->
    {Rows, Lengths} = tables(Name),
    try
        Fun(Rows, Lengths)
    catch
        error:badarg:Stack ->
            case lists:member(undefined, [ets:info(Table, id) || Table <- [Rows, Lengths]]) of
                true -> no_store(Name);
                false -> erlang:raise(error, badarg, Stack)
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
        (_NoRow, Sofar) -> Sofar
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

%% The files of the lowest ranks that are not pinned, with these: a tenth of all, and at least
%% `Least'. So evicting all files reads each row only a few times.
-spec lowest(erllama_cache_store:name(), pos_integer()) ->
    [{rank(), erllama_cache_nif:key()}].
lowest(Name, Least) ->
    Select = [
        {#row{key = '$2', rank = '$1', state = State, _ = '_'}, [], [{{'$1', '$2'}}]}
     || State <- [present, refused]
    ],
    All = unpinned(Name, table(Name, fun() -> ets:select(Name, Select) end)),
    lists:sublist(lists:sort(All), max(Least, length(All) div 10)).

unpinned(Name, Files) ->
    case pinned(Name) of
        [] ->
            Files;
        Keys ->
            Pinned = maps:from_keys(Keys, pinned),
            [File || {_, Key} = File <- Files, not is_map_key(Key, Pinned)]
    end.

%% Keys of the files that were used last before this time.
-spec unused_since(erllama_cache_store:name(), Time :: integer()) -> [erllama_cache_nif:key()].
unused_since(Name, Time) ->
    Select = [
        {#row{key = '$2', last_used = '$1', state = State, _ = '_'}, [{'<', '$1', Time}], ['$2']}
     || State <- [present, refused]
    ],
    table(Name, fun() -> ets:select(Name, Select) end).

%% The lengths of files whose keys are made of this, in ascending order, each once, up to `Most'.
%% There may be none left of a length: see exchange/4.
-spec lengths(erllama_cache_store:name(), erllama_cache_host:keyed_by(), non_neg_integer()) ->
    [non_neg_integer()].
lengths(Name, KeyedBy, Most) ->
    Select = [{{{KeyedBy, '$1'}, '_'}, [{'=<', '$1', Most}], ['$1']}],
    in_tables(Name, fun(_Rows, Lengths) -> ets:select(Lengths, Select) end).

%% How many files there are of each length, or a few more: see exchange/4.
-spec length_counts(erllama_cache_store:name()) ->
    #{erllama_cache_nif:key_length() => pos_integer()}.
length_counts(Name) ->
    in_tables(Name, fun(_Rows, Lengths) -> maps:from_list(ets:tab2list(Lengths)) end).

%%% Rows

%% The row of a file.
-spec file(erllama_cache_nif:key(), erllama_cache_nif:key_length(), pos_integer(), integer(),
           reference()) -> row().
file(Key, Length, Size, LastUsed, Token) ->
    Used = not_ahead(LastUsed),
    #row{key = Key, length = Length, size = Size, last_used = Used, rank = Used, state = present,
         token = Token}.

%% The row of a file that no load would accept.
-spec refused_file(erllama_cache_nif:key(), non_neg_integer(), integer(), reference()) -> row().
refused_file(Key, Size, LastUsed, Token) ->
    Used = not_ahead(LastUsed),
    #row{key = Key, size = Size, last_used = Used, rank = Used, state = refused, token = Token}.

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
    exchange(Name, none, Row, fun(Rows) -> ets:insert_new(Rows, Row) end).

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
claim(Name, #row{key = Key, token = Token, state = State, expires = Expires} = Old, New) ->
    Match = #row{key = Key, token = Token, state = State, expires = Expires, _ = '_'},
    replace(Name, Old, Match, New).

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
    Match = #row{key = Key, token = Token, state = reserved, _ = '_'},
    case replace(Name, Row, Match, Row#row{expires = lease_end()}) of
        true -> ok;
        false -> {error, expired}
    end.

%% Turns a reservation into its file, even if its owner is dead or its lease has ended.
-spec settle(erllama_cache_store:name(), reference(), File :: row()) -> ok | {error, expired}.
settle(Name, Token, #row{key = Key} = File) ->
    Match = #row{key = Key, token = Token, state = reserved, _ = '_'},
    case replace(Name, none, Match, File) of
        true -> ok;
        false -> {error, expired}
    end.

%% Puts a row in the place of `Old', if that still matches.
replace(Name, Old, Match, New) ->
    Replace = [{Match, [], [{const, New}]}],
    exchange(Name, Old, New, fun(Rows) -> ets:select_replace(Rows, Replace) =:= 1 end).

%% Makes a change of one row, from `Old' to `New', that says whether it was made, and counts lengths
%% accordingly.
%%
%% A length is counted before its file has a row, and discounted after that row has gone. So a count
%% is never too low, whoever looks at whatever moment. It is too high in between, and for ever if
%% the process is killed there: then someone who looks for a prefix looks up one length in vain. Too
%% low, and a stored state would never be found.
exchange(Name, Old, New, Change) ->
    in_tables(Name, fun(Rows, Lengths) ->
        ok = count(New, Lengths),
        Done = Change(Rows),
        ok = discount(case Done of true -> Old; false -> New end, Lengths),
        Done
    end).

%% Only what may be loaded counts.
count(#row{state = present, length = Length}, Lengths) ->
    _ = ets:update_counter(Lengths, Length, 1, {Length, 0}),
    ok;
count(_NoFileToLoad, _Lengths) ->
    ok.

discount(#row{state = present, length = Length}, Lengths) ->
    case ets:update_counter(Lengths, Length, -1) of
        %% Unless another has counted one since.
        0 -> _ = ets:delete_object(Lengths, {Length, 0}), ok;
        _ -> ok
    end;
discount(_NoFileToLoad, _Lengths) ->
    ok.

%% Notes that the file of a key was used at this time, in milliseconds. Returns the uses since the
%% last note in the file, and that note's time; `false' when the key has no row. In a reservation's
%% row the note does no harm. The new rank may depend on the one before it: of two uses at the same
%% moment one may then be lost to the rank.
-spec use(erllama_cache_store:name(), erllama_cache_nif:key(), integer(),
          rank() | fun((rank()) -> rank())) ->
    {Uses :: pos_integer(), Noted :: integer()} | false.
use(Name, Key, Now, ToRank) ->
    Update = [{#row.uses, 1}, {#row.noted, 0}],
    table(Name, fun() ->
        Rank = new_rank(ToRank, Name, Key),
        ets:update_element(Name, Key, [{#row.last_used, Now}, {#row.rank, Rank}]) andalso
            try ets:update_counter(Name, Key, Update) of
                [Uses, Noted] -> {Uses, Noted}
            catch
                %% Evicted in between.
                error:badarg -> false
            end
    end).

new_rank(Rank, _Name, _Key) when is_number(Rank) ->
    Rank;
new_rank(ToRank, Name, Key) ->
    case ets:lookup(Name, Key) of
        [#row{rank = Rank}] -> ToRank(Rank);
        %% Nor is there one to give the rank to.
        [] -> 0
    end.

%% Notes what a file says of its last use, by another node on the same root.
-spec used_elsewhere(erllama_cache_store:name(), erllama_cache_nif:key(), integer()) -> ok.
used_elsewhere(Name, Key, At) ->
    %% A load may have used it here meanwhile.
    Later = [{#row{key = Key, last_used = '$1', _ = '_'}, [{'<', '$1', At}], [{const, At}]}],
    table(Name, fun() ->
        case ets:select(Name, Later) of
            [At] -> _ = ets:update_element(Name, Key, {#row.last_used, not_ahead(At)}), ok;
            [] -> ok
        end
    end).

%%% Pins: of keys, whether they have a row or not

-spec pin(erllama_cache_store:name(), erllama_cache_nif:key()) -> ok.
pin(Name, Key) ->
    true = table(Name, fun() -> ets:insert(Name, {pin, {pin, Key}}) end),
    ok.

-spec unpin(erllama_cache_store:name(), erllama_cache_nif:key()) -> ok.
unpin(Name, Key) ->
    true = table(Name, fun() -> ets:delete(Name, {pin, Key}) end),
    ok.

-spec is_pinned(erllama_cache_store:name(), erllama_cache_nif:key()) -> boolean().
is_pinned(Name, Key) ->
    table(Name, fun() -> ets:member(Name, {pin, Key}) end).

-spec pinned(erllama_cache_store:name()) -> [erllama_cache_nif:key()].
pinned(Name) ->
    table(Name, fun() -> ets:select(Name, [{{pin, {pin, '$1'}}, [], ['$1']}]) end).

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
    Match = #row{key = Key, token = Token, state = present, _ = '_'},
    _ = replace(Name, Row, Match, Row#row{state = refused}),
    ok;
refuse(_Name, _NoFile) ->
    ok.

%% Marks a file that was refused as one of this length that a load has accepted: another node has
%% replaced it, or it can be read again.
-spec accept(erllama_cache_store:name(), row() | none, erllama_cache_nif:key_length()) -> ok.
accept(Name, #row{state = refused, key = Key, token = Token} = Row, Length) ->
    Match = #row{key = Key, token = Token, state = refused, _ = '_'},
    _ = replace(Name, Row, Match, Row#row{state = present, length = Length}),
    ok;
accept(_Name, _NotRefused, _Length) ->
    ok.

%% Removes a row, unless it has become another: one of another token, or a file where it was a
%% reservation.
-spec remove(erllama_cache_store:name(), row()) -> boolean().
remove(Name, #row{state = reserved} = Row) ->
    remove_in_state(Name, Row);
remove(Name, Row) ->
    %% In this order: a load may refuse the file in between. If a load accepts it in between, the
    %% file is there, and the row stays.
    remove_in_state(Name, Row#row{state = present}) orelse
        remove_in_state(Name, Row#row{state = refused}).

remove_in_state(Name, #row{key = Key, token = Token, state = State} = Row) ->
    Match = [{#row{key = Key, token = Token, state = State, _ = '_'}, [], [true]}],
    exchange(Name, Row, none, fun(Rows) -> ets:select_delete(Rows, Match) =:= 1 end).

%% Removes the rows of all files.
-spec clear(erllama_cache_store:name()) -> ok.
clear(Name) ->
    Files = fold(Name, fun
        (#row{state = reserved}, Rows) -> Rows;
        (Row, Rows) -> [Row | Rows]
    end, []),
    lists:foreach(fun(Row) -> remove(Name, Row) end, Files).

%% Ends the lease of a reservation, for tests that cannot wait for a minute.
-spec end_lease(erllama_cache_store:name(), erllama_cache_nif:key()) -> ok.
end_lease(Name, Key) ->
    true = ets:update_element(Name, Key, {#row.expires, erlang:monotonic_time(millisecond) - 1}),
    ok.
