%% Files whose state a model has refused: put aside, under their key's name with `.bad' behind it,
%% where no load finds them and a person can look at them. A few are kept, and not for long.
%%
%% @private
-module(erllama_cache_store_reject).

-include_lib("kernel/include/file.hrl").
-include("erllama_cache_store.hrl").

-export([put_aside/2, forget_old/1]).

%% So many are kept, the newest ones, and none longer than so many seconds.
-define(KEPT, 8).
-define(KEPT_FOR, 7 * 86400).

%% `ok' also if there is no file.
-spec put_aside(#config{}, erllama_cache_nif:key()) -> ok | {error, file:posix() | badarg}.
put_aside(#config{name = Name, root = Root, counters = Counters} = Config, Key) ->
    Known = erllama_cache_index:row(Name, Key),
    File = erllama_cache_path:final(Root, Key),
    Rename = fun(_Turn) -> file:rename(File, aside(File)) end,
    case erllama_cache_io_limit:run(Rename) of
        ok ->
            ok = counters:add(Counters, ?REJECTED, 1),
            ok = erllama_cache_store_log:rejected(Config, aside(File)),
            ok = erllama_cache_store_load:gone(Config, Known),
            forget_old(Config);
        {error, enoent} ->
            nothing_there(Config, Key, Known);
        {error, _} = Error ->
            Error
    end.

%% Or there is no root.
nothing_there(#config{path = Path} = Config, Key, Known) ->
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:exists(Turn, Path, Key) end) of
        {error, _} = Error -> Error;
        _ -> erllama_cache_store_load:gone(Config, Known)
    end.

aside(File) when is_binary(File) -> <<File/binary, ".bad">>;
aside(File) -> File ++ ".bad".

%% Removes those that are too many or too old. What cannot be removed is tried again the next time.
-spec forget_old(#config{}) -> ok.
forget_old(#config{root = Root}) ->
    erllama_cache_io_limit:run(fun(_Turn) ->
        Newest = lists:reverse(lists:sort(rejected(Root))),
        Since = erlang:system_time(second) - ?KEPT_FOR,
        {Kept, TooMany} = lists:split(min(?KEPT, length(Newest)), Newest),
        TooOld = [Each || {Time, _} = Each <- Kept, Time < Since],
        lists:foreach(fun({_, File}) -> _ = file:delete(File, [raw]) end, TooMany ++ TooOld)
    end).

%% With the time at which each was put aside, in seconds: a rename changes no other.
rejected(Root) ->
    Names = case file:list_dir(Root) of
        {ok, Listed} -> Listed;
        {error, _} -> []
    end,
    [
        {Time, File}
     || Name <- Names,
        is_aside(Name),
        File <- [filename:join(Root, Name)],
        {ok, #file_info{ctime = Time}} <- [file:read_file_info(File, [raw, {time, posix}])]
    ].

is_aside(Name) ->
    re:run(Name, "^[0-9a-f]{64}\\.kvc\\.bad$", [{capture, none}]) =:= match.
