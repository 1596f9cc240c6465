%% The log events of a store. docs/guide/operations.md lists them.
%%
%% @private
-module(erllama_cache_store_log).

-export([started/3, found/2, skipped/3, rejected/2, root_changed/1, root_unreadable/2,
         fetch_failed/4]).

-include("erllama_cache_log.hrl").
-include("erllama_cache_store.hrl").

%% The root has been scanned.
-spec started(#config{}, TakesUnnamed :: boolean() | {error, term()}, Ms :: integer()) -> ok.
started(#config{name = Name, root = Root}, TakesUnnamed, Ms) ->
    {Files, Bytes, _Reservations} = erllama_cache_index:count(Name),
    ?LOG_INFO(#{event => store_scanned, store => Name, root => Root, files => Files, bytes => Bytes,
                ms => Ms}, ?LOG_META),
    case TakesUnnamed of
        false -> ?LOG_NOTICE(#{event => root_needs_names, store => Name, root => Root}, ?LOG_META);
        _ -> ok
    end.

%% What the scan found, if it is worth an event.
-spec found(#config{}, erllama_cache_nif:found()) -> ok.
found(#config{name = Name, root = Root}, {removed, Key, Reason}) ->
    ?LOG_WARNING(#{
        event => corrupt_file_removed, store => Name, reason => Reason,
        file => erllama_cache_path:final(Root, Key)
    }, ?LOG_META);
found(Config, {skipped, Key, _Size, _Modified, Reason}) ->
    skipped(Config, Key, Reason);
found(_Config, {file, _Key, _Length, _Size, _LastUsed, _Hits}) ->
    ok;
found(_Config, rejected) ->
    ok;
found(_Config, swept) ->
    ok.

%% A file stays that should have gone, or that cannot be read.
-spec skipped(#config{}, undefined | erllama_cache_nif:key(), term()) -> ok.
skipped(#config{name = Name, root = Root}, Key, Reason) ->
    File = case Key of
        undefined -> temporary_file;
        _ -> erllama_cache_path:final(Root, Key)
    end,
    ?LOG_WARNING(#{event => file_skipped, store => Name, reason => Reason, file => File},
                 ?LOG_META).

%% A model has refused the state of a file, which now has this name.
-spec rejected(#config{}, file:filename_all()) -> ok.
rejected(#config{name = Name}, File) ->
    ?LOG_WARNING(#{event => state_rejected, store => Name, file => File}, ?LOG_META).

%% The root's path leads to another directory than before.
-spec root_changed(#config{}) -> ok.
root_changed(#config{name = Name, root = Root}) ->
    ?LOG_WARNING(#{event => root_changed, store => Name, root => Root}, ?LOG_META).

%% That directory cannot be scanned.
-spec root_unreadable(#config{}, term()) -> ok.
root_unreadable(#config{name = Name, root = Root}, Reason) ->
    ?LOG_WARNING(#{event => root_unreadable, store => Name, root => Root, reason => Reason},
                 ?LOG_META).

%% A peer that had a file could not send it, or sent something else.
-spec fetch_failed(#borrower{}, erllama_cache_nif:key(), node(), term()) -> ok.
fetch_failed(#borrower{name = Name, root = Root}, Key, Node, Reason) ->
    ?LOG_WARNING(#{event => fetch_failed, store => Name, peer => Node, reason => Reason,
                   file => erllama_cache_path:final(Root, Key)}, ?LOG_META).
